// Masked language modelling: which tokens of a row are hidden, and what stands in their place.
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

/// No unit is longer than this, so that a row's masked slots can be counted beforehand.
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

/// For each id, what tells where words begin. Only MaskUnit::whole_word needs them.
struct WordTables {
    std::vector<std::uint8_t> first_class;  ///< script class of the piece's first character
    std::vector<std::uint8_t> last_class;   ///< script class of its last character
    std::vector<std::uint8_t> starts_word;  ///< whether the piece begins with a word boundary
};

/// Where a segment's text stands in a row, without its [CLS] and [SEP].
struct Text {
    std::size_t begin = 0;
    std::size_t length = 0;
    /// One byte a token, whether a word begins there; null where the vocabulary is to tell.
    const std::uint8_t* word_starts = nullptr;

    /// What is left of the text from its token number `offset` on.
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

/// Marks the slots from number `used` on as unused.
void clear_slots(const MaskedSlots& slots, std::size_t used) noexcept;

/// Masks rows. Const methods are thread-safe.
class Masker {
  public:
    /// Working memory, to be reused from row to row.
    struct Scratch {
        struct Unit {
            std::int32_t begin = 0;
            std::int32_t length = 0;
        };
        std::vector<std::int32_t> maskable;  ///< positions that may be masked, ascending
        std::vector<Text> runs;              ///< the same as stretches without a gap
        std::vector<Unit> units;             ///< words or spans of them
        std::vector<std::uint64_t> chosen;  ///< one bit a position
    };

    /// Throws std::invalid_argument for options or tables that make no sense together.
    Masker(Vocabulary vocabulary, MaskingOptions options, const WordTables& words);

    const Vocabulary& vocabulary() const noexcept { return vocabulary_; }

    /// Masks a row, whose text stands in `texts`, in place and fills its slots: positions ascending,
    /// labels the tokens that stood there, weights 1; unused slots are 0.
    ///
    /// round(probability * maskable) tokens are masked, at least one if one is maskable; by units
    /// other than tokens on average so many, in a row up to max_unit_tokens - 1 more or fewer (maybe
    /// none). There are never more than slots. `check_probability` says which probabilities make sense.
    /// `tokens` must be valid ids; all that is drawn depends on `key` and the row's content alone.
    void mask(std::span<std::int32_t> tokens, std::span<const Text> texts, double probability,
              std::uint64_t key, const MaskedSlots& slots, Scratch& scratch) const;

  private:
    bool is_special(std::int32_t token) const noexcept {
        return is_special_[static_cast<std::size_t>(token)];
    }
    void list_maskable(std::span<const std::int32_t> tokens, std::span<const Text> texts,
                       Scratch& scratch) const;
    void list_words(std::span<const std::int32_t> tokens, Scratch& scratch) const;
    /// Divides the maskable tokens into spans whose length k is drawn in proportion to 1/k, as long
    /// as the text goes on.
    void list_ngrams(CounterRandom& random, Scratch& scratch) const;
    std::int32_t draw_ngram_length(CounterRandom& random) const noexcept;
    std::int32_t replacement(std::int32_t token, CounterRandom& random) const noexcept;

    void choose_tokens(std::int64_t target, CounterRandom& random, Scratch& scratch) const;
    /// Chooses units whole, each with the probability target / maskable however long it is: all are
    /// laid on a circle in random order, and those that begin in an arc of `target` tokens are chosen.
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
    std::array<std::int32_t, max_unit_tokens> ngram_shares_end_{};  ///< summed up to each length
    std::uint64_t num_ngram_shares_ = 0;
    std::uint64_t mask_below_ = 0;    ///< of 2^32
    std::uint64_t random_below_ = 0;  ///< of 2^32
};

}  // namespace megatron_bert
