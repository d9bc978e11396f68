// Masking and batches, assembled by several threads at once.
#include <algorithm>
#include <future>
#include <memory>
#include <numeric>
#include <vector>

#include "batch.h"
#include "check.h"
#include "datasets.h"

namespace megatron_bert::test {

namespace {

constexpr std::int32_t vocab_size = 300;
constexpr std::int32_t first_ordinary_id = 5;
constexpr std::size_t seq_length = 64;
constexpr std::size_t masked_slots = 24;
constexpr std::int64_t num_rows = 400;
constexpr MaskUnit units[] = {MaskUnit::token, MaskUnit::whole_word, MaskUnit::ngram};

Masker make_masker(MaskUnit unit) {
    WordTables words;
    for (std::int32_t id = 0; id < vocab_size; ++id) {
        words.first_class.push_back(static_cast<std::uint8_t>(id % 3));
        words.last_class.push_back(static_cast<std::uint8_t>(id % 2));
        words.starts_word.push_back(id % 5 == 0);
    }
    return {{vocab_size, 1, 2, 3, 0, {4}}, {unit, 3, 0.8, 0.1}, words};
}

/// The arrays of a batch, filled with garbage.
class Arrays {
  public:
    explicit Arrays(std::vector<std::int64_t> rows)
        : rows_(std::move(rows)),
          tokens_(rows_.size() * seq_length, -7),
          positions_(tokens_.size(), -7),
          masked_(rows_.size() * masked_slots, -7),
          labels_(masked_.size(), -7),
          weights_(masked_.size(), -7) {}

    BatchArrays view() {
        return {rows_,          seq_length,     masked_slots,   tokens_.data(), positions_.data(),
                masked_.data(), labels_.data(), weights_.data()};
    }

    /// A row's tokens as they were before they were masked. Checks its slots on the way.
    std::vector<std::int32_t> unmasked(std::size_t row) const {
        const auto at = [row](const auto& array, std::size_t width) {
            return array.begin() + static_cast<std::ptrdiff_t>(row * width);
        };
        std::vector<std::int32_t> tokens(at(tokens_, seq_length), at(tokens_, seq_length) + 64);
        std::int32_t previous = -1;
        for (std::size_t slot = 0; slot < masked_slots; ++slot) {
            const std::int32_t position = at(masked_, masked_slots)[static_cast<long>(slot)];
            const std::int32_t label = at(labels_, masked_slots)[static_cast<long>(slot)];
            if (at(weights_, masked_slots)[static_cast<long>(slot)] == 0.0F) {
                check(position == 0 && label == 0);
                previous = static_cast<std::int32_t>(seq_length);  // No used slot may follow.
                continue;
            }
            check(position > previous && position < static_cast<std::int32_t>(seq_length));
            check(label >= first_ordinary_id && label < vocab_size);
            tokens[static_cast<std::size_t>(position)] = label;
            previous = position;
        }
        return tokens;
    }

  private:
    std::vector<std::int64_t> rows_;
    std::vector<std::int32_t> tokens_;
    std::vector<std::int32_t> positions_;
    std::vector<std::int32_t> masked_;
    std::vector<std::int32_t> labels_;
    std::vector<float> weights_;
};

struct Rows {
    std::shared_ptr<const RowPlan> plan;
    BatchAssembler assembler;
};

/// Two corpora, one of them with word starts, and a plan of their rows.
class Corpora {
  public:
    Corpora() {
        write_dataset(folder_.path("a"), TokenType::uint16, contents_[0]);
        write_dataset(folder_.path("b"), TokenType::int32, contents_[1]);
        const auto num_bits = static_cast<std::size_t>(contents_[1].num_tokens());
        write_file(folder_.path("b.words"), std::vector((num_bits + 7) / 8, std::byte{0x5b}));
    }

    Rows rows(MaskUnit unit, FileAccess access) const {
        std::vector<CorpusFiles> files;
        std::vector<CorpusLengths> lengths;
        for (const char* name : {"a", "b"}) {
            files.push_back(
                {std::make_shared<const IndexedDataset>(folder_.path(name), access), nullptr});
            lengths.emplace_back(files.back().dataset);
        }
        files[1].word_starts = std::make_shared<const WordStarts>(
            folder_.path("b.words"), files[1].dataset->num_tokens(), access);
        auto plan = std::make_shared<const RowPlan>(lengths, std::vector{1.0, 2.0},
                                                    std::vector<Stage>{{seq_length, num_rows}}, 5);
        return {plan, {std::move(files), plan, make_masker(unit), {0.2}, 11}};
    }

    const Content& content(std::size_t corpus) const { return contents_[corpus]; }

  private:
    TemporaryFolder folder_;
    Content contents_[2] = {random_content(1, 300, 0, 50, first_ordinary_id, vocab_size),
                            random_content(2, 80, 4, 60, first_ordinary_id, vocab_size)};
};

void a_row_unmasked_is_its_segments_between_cls_and_sep() {
    const Corpora corpora;
    const auto [plan, assembler] = corpora.rows(MaskUnit::ngram, FileAccess::map);
    std::vector<std::int64_t> rows(num_rows);
    std::iota(rows.begin(), rows.end(), 0);
    Arrays arrays(rows);
    assembler.fill(arrays.view());
    std::vector<Segment> segments;
    for (std::size_t row = 0; row < rows.size(); ++row) {
        plan->segments(rows[row], segments);
        std::vector<std::int32_t> expected;
        for (const auto& [corpus, span] : segments) {
            const auto document =
                corpora.content(corpus).document(static_cast<std::size_t>(span.document));
            expected.push_back(1);
            expected.insert(expected.end(), document.begin() + span.offset,
                            document.begin() + span.offset + span.length);
            expected.push_back(2);
        }
        expected.resize(seq_length, 0);
        check(arrays.unmasked(row) == expected);
    }
}

void threads_at_once_assemble_what_one_does() {
    const Corpora corpora;
    for (const MaskUnit unit : units) {
        for (const FileAccess access : {FileAccess::map, FileAccess::read}) {
            const BatchAssembler assembler = corpora.rows(unit, access).assembler;
            // Batches of different sizes, with surplus rows, that together are all rows.
            const auto hash_of_share = [&assembler](std::int64_t share) {
                std::uint64_t hash = 0;
                for (std::int64_t first = share; first < num_rows; first += 4 * (share + 3)) {
                    std::vector<std::int64_t> rows{surplus_row};
                    for (std::int64_t row = first; row < first + 4 * (share + 3); row += 4) {
                        rows.push_back(row < num_rows ? row : surplus_row);
                    }
                    Arrays arrays(rows);
                    hash += assembler.fill(arrays.view());
                    for (std::size_t row = 0; row < rows.size(); ++row) {
                        arrays.unmasked(row);
                    }
                }
                return hash;
            };
            std::vector<std::int64_t> rows(num_rows);
            std::iota(rows.begin(), rows.end(), 0);
            Arrays arrays(rows);
            const std::uint64_t expected = assembler.fill(arrays.view());

            std::vector<std::future<std::uint64_t>> shares;
            for (std::int64_t thread = 0; thread < 8; ++thread) {
                shares.push_back(std::async(std::launch::async, hash_of_share, thread % 4));
            }
            std::uint64_t hash = 0;
            for (auto& share : shares) {
                hash += share.get();
            }
            check_equal(hash, expected + expected);
        }
    }
}

void special_tokens_in_the_text_are_never_masked() {
    for (const MaskUnit unit : units) {
        const Masker masker = make_masker(unit);
        CounterRandom random(9);
        Masker::Scratch scratch;
        for (std::uint64_t key = 0; key < 300; ++key) {
            const auto size = static_cast<std::size_t>(random.below(200));
            std::vector<std::int32_t> tokens(size);
            for (std::int32_t& token : tokens) {
                token = static_cast<std::int32_t>(random.below(2) * random.below(vocab_size));
            }
            const std::vector<std::int32_t> before = tokens;
            const Text text{0, size};
            std::vector<std::int32_t> positions(masked_slots);
            std::vector<std::int32_t> labels(masked_slots);
            std::vector<float> weights(masked_slots);
            masker.mask(tokens, std::span(&text, 1), 0.3, key,
                        {positions.data(), labels.data(), weights.data(), masked_slots}, scratch);
            for (std::size_t slot = 0; slot < masked_slots && weights[slot] != 0.0F; ++slot) {
                const auto position = static_cast<std::size_t>(positions[slot]);
                check(before.at(position) == labels[slot]);
                check(labels[slot] >= first_ordinary_id);
            }
            for (std::size_t position = 0; position < size; ++position) {
                check(before[position] >= first_ordinary_id ||
                      tokens[position] == before[position]);
            }
        }
    }
}

void a_token_outside_the_vocabulary_is_refused_with_its_document() {
    const TemporaryFolder folder;
    write_dataset(folder.path("set"), TokenType::int32, {{{7}, {8, vocab_size}}, {0, 1, 2}});
    const auto dataset = std::make_shared<const IndexedDataset>(folder.path("set"));
    auto plan = std::make_shared<const RowPlan>(std::vector{CorpusLengths(dataset)},
                                                std::vector{1.0},
                                                std::vector<Stage>{{seq_length, 1}}, 0);
    const BatchAssembler assembler({{dataset, nullptr}}, plan, make_masker(MaskUnit::token), {0.2},
                                   0);
    Arrays arrays({0});
    check_throws<TokenIdError>("document 1 holds the token id 300",
                               [&] { assembler.fill(arrays.view()); });
    Arrays outside({1});
    check_throws<std::out_of_range>("row 1 of 1", [&] { assembler.fill(outside.view()); });
}

constexpr Test tests[] = {
    {"a row unmasked is its segments between CLS and SEP",
     a_row_unmasked_is_its_segments_between_cls_and_sep},
    {"threads at once assemble what one does", threads_at_once_assemble_what_one_does},
    {"special tokens in the text are never masked", special_tokens_in_the_text_are_never_masked},
    {"a token outside the vocabulary is refused with its document",
     a_token_outside_the_vocabulary_is_refused_with_its_document},
};

}  // namespace

std::span<const Test> batch_tests() { return tests; }

}  // namespace megatron_bert::test
