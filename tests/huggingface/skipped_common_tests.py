"""Every common test of transformers that may be skipped here, and why.

`test_releases.py` refuses a skipped test that no pattern names. The patterns are matched against
whole names, without `test_`. Most of these tests skip themselves.
"""

from __future__ import annotations

SKIPPED: dict[str, str] = {
    # What the machine or the environment lacks
    r"(flash_attn_2|flash_attn_3|flash_attn_4)_.*": (
        "needs a GPU and the library; test_attention.py puts a reference in its place"
    ),
    r"(flash_attn_kernels_.*|kernels_can_load_without_crashing)": "needs the kernels library",
    r"(cpu_offload|disk_offload_(bin|safetensors)|model_parallelism)": "needs GPUs",
    r"(model_parallel_equal_results|model_parallelization|multi_gpu_data_parallel_forward)": (
        "needs GPUs"
    ),
    r"can_load_with_(device_context_manager|global_device_set)": "needs a GPU",
    r"(sdpa_can_compile_dynamic|sdpa_can_dispatch_on_flash)": "needs a GPU",
    r"torch_compile_for_training": "needs a GPU, and is slow",
    r"torch_export": "is slow; test_downstream.py exports to ONNX",
    r"resize_.*_with_deepspeed.*": "needs DeepSpeed",
    # What the architecture does not have
    r"flex_attention_with_grads": "needs a GPU; flex attention is not claimed",
    r"(attn_implementation|sdpa_can_dispatch|can_set_attention_dynamically)_composite_models?": (
        "not made of several models"
    ),
    r"internal_model_config_and_subconfig_are_same": "not made of several models",
    r"resize_position_vector_embeddings": "the position table cannot be resized",
    r"(sliding_window_mask|vision_axial_rope|model_rope_.*)": "learned positions, global attention",
    r"(causal_lm_loss_honors_shift_labels|encoder_decoder_loss_no_double_shift)": "an encoder",
    r"bc_cache_name_forward": "an encoder has no cache",
    r"(moe_models_record_router_logits|output_router_logits_from_config)": "no experts",
    r"eager_matches_batched_and_grouped_inference_.*": "no experts",
    r"keep_in_fp32_modules.*": "every module may be BF16",
    r"tp_plan_matches_params": "no tensor-parallel plan for inference",
    r"(can_load_from_already_mapped_keys|reverse_loading_mapping)": (
        "weights keep their names between releases"
    ),
    r"(capture_outputs_decorator|can_capture_specific_layers_hidden_states)": (
        "states are returned by the encoder itself, since transformers 4 lacks that decorator"
    ),
    r"eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions": (
        "looks for output_attentions among the heads' named arguments; they hand it on"
    ),
    # transformers 4 only
    r"(head_pruning.*|headmasking)": "heads are neither pruned nor masked, as in transformers 5",
    r"can_init_all_missing_weights": "4.57 runs it for its own files alone; 5 runs it here",
    r"torch_fx.*": "torch.fx symbolic tracing left transformers with 5",
    r"torchscript_.*": "switched off for all models in 4.57",
    # Pipelines of other tasks
    r"pipeline_(.*audio.*|.*image.*|.*video.*|automatic_speech_recognition|any_to_any)(_fp16)?": (
        "text in only"
    ),
    r"pipeline_(depth_estimation|mask_generation|.*object_detection)(_fp16)?": "text in only",
    r"pipeline_(document|table|visual)_question_answering(_fp16)?": "plain text only",
    r"pipeline_(text_generation|text2text_generation|summarization|translation)(_fp16)?": (
        "an encoder generates no text"
    ),
}
