// Masked language modelling: which tokens of a row are hidden, and what replaces them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "random.h"

namespace megatron_bert {

/// What is masked together: single tokens, words, or runs of up to max_ngram tokens.
enum class MaskUnit { token, whole_word, ngram };

/// No unit is longer than this, so that the number of a row's masked slots is known beforehand.
inline constexpr std::int64_t max_unit_tokens = 8;

struct MaskingOptions {
    MaskUnit unit = MaskUnit::token;
    std::int64_t max_ngram = 3;
    double mask_ratio = 0.8;    ///< share of the masked tokens that become [MASK]
    double random_ratio = 0.1;  ///< share that becomes a random token; the rest stays as it is
};

struct Vocabulary {
    std::int32_t size = 0;  ///< ids are in [0, size)
    std::int32_t cls = 0;
    std::int32_t sep = 0;
    std::int32_t mask = 0;
    std::int32_t pad = 0;
    std::vector<std::int32_t> special_ids;  ///< never masked, never drawn; the four above belong too
};

/// For each id, what determines where words begin. Only MaskUnit::whole_word needs these tables.
struct WordTables {
    std::vector<std::uint8_t> first_class;  ///< script class of the piece's first character
    std::vector<std::uint8_t> last_class;   ///< script class of its last character
    std::vector<std::uint8_t> starts_word;  ///< whether the piece begins with a word boundary
};

/// Where a segment's text is in a row, without its [CLS] and [SEP].
struct Text {
    std::size_t begin = 0;
    std::size_t length = 0;
    /// One byte per token: whether a word begins there; null if the vocabulary decides.
    const std::uint8_t* word_starts = nullptr;

    /// The rest of the text from its token number `offset` on.
    Text from(std::size_t offset) const noexcept {
        return {begin + offset, length - offset,
                word_starts == nullptr ? nullptr : word_starts + offset};
    }
};

/// Where a row's masked tokens are written: arrays of `size` slots.
struct MaskedSlots {
    std::int32_t* positions = nullptr;
    std::int32_t* labels = nullptr;
    float* weights = nullptr;
    std::size_t size = 0;
};

/// Throws std::invalid_argument unless the share of tokens to mask is in (0, 1].
void check_probability(double probability);

/// Marks the slots from `used` on as unused.
void clear_slots(const MaskedSlots& slots, std::size_t used) noexcept;

/// Masks rows. Const methods are thread-safe.
class Masker {
  public:
    /// Working memory, reused from row to row.
    struct Scratch {
        struct Unit {
            std::int32_t begin = 0;
            std::int32_t length = 0;
        };
        std::vector<std::int32_t> maskable;  ///< positions that may be masked, ascending
        std::vector<Text> runs;              ///< the same as contiguous runs
        std::vector<Unit> units;             ///< the same divided into words or spans
        std::vector<std::uint64_t> chosen;  ///< one bit per position
    };

    /// Throws std::invalid_argument for options or tables that are invalid or do not fit together.
    Masker(Vocabulary vocabulary, MaskingOptions options, const WordTables& words);

    const Vocabulary& vocabulary() const noexcept { return vocabulary_; }

    /// Masks a row, whose text is where `texts` says, in place and fills its slots: ascending
    /// positions, the original tokens as labels, weights of 1; unused slots are 0.
    ///
    /// round(probability * maskable) tokens are masked, at least one if one is maskable. With units
    /// other than tokens this is the average; a single row may have up to max_unit_tokens - 1 more
    /// or fewer (maybe none). There are never more than slots. `check_probability` says which
    /// probabilities are valid. `tokens` must be valid ids; all random choices depend on `key` and
    /// the row's content alone.
    void mask(std::span<std::int32_t> tokens, std::span<const Text> texts, double probability,
              std::uint64_t key, const MaskedSlots& slots, Scratch& scratch) const;

  private:
    bool is_special(std::int32_t token) const noexcept {
        return is_special_[static_cast<std::size_t>(token)];
    }
    void list_maskable(std::span<const std::int32_t> tokens, std::span<const Text> texts,
                       Scratch& scratch) const;
    void list_words(std::span<const std::int32_t> tokens, Scratch& scratch) const;
    /// Divides the maskable tokens into spans whose length k is drawn in proportion to 1/k, but
    /// which end where their text does.
    void list_ngrams(CounterRandom& random, Scratch& scratch) const;
    std::int32_t draw_ngram_length(CounterRandom& random) const noexcept;
    std::int32_t replacement(std::int32_t token, CounterRandom& random) const noexcept;

    void choose_tokens(std::int64_t target, CounterRandom& random, Scratch& scratch) const;
    /// Chooses whole units, each with the probability target / maskable regardless of its length:
    /// units are arranged on a circle in random order, and those that begin in an arc of `target`
    /// tokens are chosen.
    void choose_units(std::int64_t target, std::size_t num_slots, CounterRandom& random,
                      Scratch& scratch) const;

    /// A row of the word tables.
    struct WordEnds {
        std::uint8_t first = 0;
        std::uint8_t last = 0;
        std::uint8_t starts_word = 0;
    };

    Vocabulary vocabulary_;
    MaskingOptions options_;
    std::vector<bool> is_special_;
    std::int32_t largest_special_ = 0;
    std::vector<std::int32_t> ordinary_ids_;
    std::vector<WordEnds> word_ends_;  ///< of each id
    std::array<std::int32_t, max_unit_tokens> ngram_shares_end_{};  ///< cumulative, by length
    std::uint64_t num_ngram_shares_ = 0;
    std::uint64_t mask_below_ = 0;    ///< of 2^32
    std::uint64_t random_below_ = 0;  ///< of 2^32
};

}  // namespace megatron_bert
