"""The model's and the data's arguments."""

from __future__ import annotations

from megatron_bert.translation.argument import Argument, becomes, holds, lacks

MODEL: tuple[Argument, ...] = (
    becomes("--num-layers --encoder-num-layers", "model.num_layers", read=int),
    becomes("--hidden-size", "model.hidden_size", read=int),
    becomes(
        "--ffn-hidden-size",
        "model.ffn_hidden_size",
        "columns of gate and up projection each; without `--swiglu` two thirds of Megatron's, "
        "which keeps the number of parameters",
    ),
    holds("--swiglu", "every MLP is gated"),
    becomes("--num-attention-heads", "model.num_attention_heads", read=int),
    becomes(
        "--num-query-groups",
        "model.num_query_groups",
        "counts only with `--group-query-attention`; else as many as heads",
        default="1",
    ),
    holds("--group-query-attention", "`model.num_query_groups` says it"),
    lacks("--kv-channels", "a head has `hidden_size / num_attention_heads` channels"),
    becomes("--max-position-embeddings", "model.max_position_embeddings", read=int),
    holds(
        "--position-embedding-type",
        "positions are learned; rotary ones come with `model.architecture: modernbert`, "
        "which differs in more than that",
        values="learned_absolute",
    ),
    lacks(
        "--use-rotary-position-embeddings --rotary-* --use-rope-* --rope-* --no-rope-freq "
        "--no-position-embedding --relative-attention-* --mrope-*",
        "rotary positions come with `model.architecture: modernbert` (`model.rope_theta`)",
    ),
    becomes("--norm-epsilon --layernorm-epsilon", "model.norm_eps", read=float, default="1e-5"),
    holds("--normalization", "every norm is a LayerNorm", values="LayerNorm"),
    lacks("--apply-layernorm-1p --qk-layernorm --qk-l2-norm", "norms are plain LayerNorm"),
    lacks(
        "--apply-residual-connection-post-layernorm",
        "norms stand before attention and MLP (PreNorm)",
    ),
    lacks("--openai-gelu --squared-relu --quick-geglu", "the MLP is SwiGLU (modernbert: GEGLU)"),
    lacks(
        "--disable-bias-linear --add-qkv-bias",
        "`retrievabert` has biases everywhere, `modernbert` nowhere",
    ),
    lacks("--untie-embeddings-and-output-weights", "the head uses the embedding table"),
    holds("--bert-no-binary-head", "masked tokens are all that is predicted"),
    lacks("--init-method-xavier-uniform", "weights begin normally distributed, `model.init_std`"),
    lacks("--embedding-init-method-std", "one `model.init_std` serves the embeddings too"),
    becomes("--init-method-std", "model.init_std", read=float, default="0.02"),
    becomes("--hidden-dropout", "model.hidden_dropout", read=float, default="0.1"),
    becomes("--attention-dropout", "model.attention_dropout", read=float, default="0.1"),
    lacks(
        "--window-size --window-attn-skip-freq",
        "local attention comes with `model.architecture: modernbert` (`model.local_attention`)",
    ),
    lacks(
        "--num-experts --moe-* --expert-* --multi-latent-attention --mtp-* --heterogeneous-* "
        "--hybrid-* --mamba-* --is-hybrid-model",
        "the model is a dense encoder",
    ),
    lacks(
        "--decoder-* --retro-* --vision-* --ict-* --biencoder-* --bert-load --titles-data-path "
        "--query-in-block-prob --use-one-sent-docs --evidence-data-path --retriever-* "
        "--block-data-path --embedding-path --indexer-* --img-* --num-classes --num-channels "
        "--patch-dim --dino-* --swin-* --mask-type --mask-factor --iter-per-epoch --rl-* --grpo-*",
        "belongs to Megatron-LM's other models",
    ),
    lacks("--spec", "see docs/architecture.md on where to add a block"),
    holds("--use-mcore-models --use-legacy-models", "there is one implementation"),
    holds(
        "--output-bert-embeddings --bert-embedder-type",
        "the exported encoder gives hidden states, see docs/huggingface.md",
    ),
    holds("--onnx-safe", "exports go to ONNX as they are, see docs/huggingface.md"),
)

DATA: tuple[Argument, ...] = (
    becomes(
        "--data-path",
        "data.train.N.prefix data.train.N.weight data.train.N.epochs",
        "datasets are read as they are; a list without weights, which Megatron-LM blends by size, "
        "becomes `epochs: 1` each",
    ),
    becomes("--train-data-path", "data.train.N.prefix data.train.N.weight", "as `--data-path`"),
    becomes("--valid-data-path", "data.valid.N.prefix", "each is evaluated by itself"),
    lacks("--test-data-path", "evaluate a third set as one more of `data.valid`"),
    becomes(
        "--split",
        "data.held_out_fraction",
        "its second share; held-out documents are chosen by a hash, not taken from the end, and "
        "there is no test share",
        default="969,30,1",
    ),
    becomes(
        "--tokenizer-model",
        "data.tokenizer",
        "a SentencePiece `.model` or a `tokenizer.json` with the pieces named in docs/data.md",
    ),
    holds(
        "--tokenizer-type",
        "the file says what it is; other types are not read",
        values="SentencePieceTokenizer GPTSentencePieceTokenizer Llama2Tokenizer "
        "HuggingFaceTokenizer",
    ),
    lacks(
        "--vocab-file --merge-file",
        "WordPiece and GPT-2 vocabularies are not read: tokenize the text anew with a "
        "SentencePiece model (tools/train_tokenizer.py, tools/preprocess_data.py)",
    ),
    holds("--vocab-size", "the tokenizer's number of pieces, padded to a multiple of 128"),
    becomes("--padded-vocab-size", "model.vocab_size", read=int),
    holds(
        "--make-vocab-size-divisible-by",
        "128, whatever `parallel.tensor` is; for another size set `model.vocab_size`",
        values="128",
    ),
    lacks("--vocab-extra-ids", "there are no sentinel tokens"),
    lacks(
        "--tokenizer-* --tiktoken-* --trust-remote-code",
        "the special pieces are found by name, and no code of a tokenizer's is run",
    ),
    becomes("--mask-prob", "mlm.probability", read=float, default="0.15"),
    lacks("--short-seq-prob", "rows are packed full; texts have the lengths that they have"),
    lacks("--sample-rate", "set the corpora's weights or epochs instead"),
    lacks(
        "--data-args-path --per-split-data-args-path --per-dataset-sequences-path",
        "write the list under `data.train`",
    ),
    holds(
        "--data-cache-path --dataloader-fast-cache-load --dataloader-defer-npy-index-mmap "
        "--num-dataset-builder-threads --mid-level-dataset-surplus",
        "rows are computed from their number: there is no index to build or to keep",
    ),
    holds("--data-impl", "datasets are `.bin` and `.idx` of `mmap`", values="mmap infer"),
    holds("--no-mmap-bin-files", "read by `pread` where a file cannot be mapped"),
    holds("--num-workers", "threads assemble rows, `data.threads`; one is enough as measured"),
    holds("--dataloader-type", "one pass after the other, each in another order"),
    holds(
        "--reset-position-ids --reset-attention-mask --eod-mask-loss "
        "--no-create-attention-mask-in-dataloader --allow-ambiguous-pad-tokens",
        "texts of a row never see each other, and positions begin anew in each",
    ),
    lacks("--mock-data", "`tools/benchmark.py` makes synthetic text"),
    lacks("--object-storage-cache-path", "datasets are files"),
    lacks("--fim-*", "no text is generated"),
    lacks("--phase-transition-iterations", "write the phases as stages of the `curriculum`"),
)
