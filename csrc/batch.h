// From row numbers to the arrays that a training step consumes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <vector>

#include "indexed_dataset.h"
#include "masking.h"
#include "row_plan.h"
#include "word_starts.h"

namespace megatron_bert {

/// A dataset holds a token id that is not in the vocabulary.
class TokenIdError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

/// Placeholder in a batch's list of rows for a row without data.
inline constexpr std::int64_t surplus_row = -1;

/// The arrays of a batch, row after row: B rows of S slots, M masked slots a row.
struct BatchArrays {
    std::span<const std::int64_t> rows;  ///< [B] numbers within the run, or `surplus_row`
    std::size_t seq_length = 0;          ///< S
    std::size_t masked_slots = 0;        ///< M
    std::int32_t* tokens = nullptr;      ///< [B, S]
    std::int32_t* positions = nullptr;   ///< [B, S], from 0 in each segment
    std::int32_t* masked = nullptr;      ///< [B, M] positions in the row
    std::int32_t* labels = nullptr;      ///< [B, M]
    float* weights = nullptr;            ///< [B, M] 1, or 0 in unused slots
};

/// A corpus' tokens and, if a dictionary found them, the beginnings of its words (else null).
struct CorpusFiles {
    std::shared_ptr<const IndexedDataset> dataset;
    std::shared_ptr<const WordStarts> word_starts;
};

/// Assembles batches: [CLS] text [SEP] [CLS] text [SEP] ..., padded to the row's end, masked.
/// The padding is a segment of its own, with positions from 0, that no text attends to.
/// Const methods are thread-safe.
class BatchAssembler {
  public:
    /// `probabilities` has the share of tokens to mask in each of the plan's stages.
    /// Throws std::invalid_argument unless the plan is of these corpora and stages.
    BatchAssembler(std::vector<CorpusFiles> corpora, std::shared_ptr<const RowPlan> plan,
                   Masker masker, std::vector<double> probabilities, std::uint64_t seed);

    /// Fills the arrays and returns the batch's hash: the sum, modulo 2^64, over its rows of a hash
    /// of the row's tokens, positions, masked positions and labels. So it depends neither on the
    /// order of rows nor on their division among batches. A surplus row is all padding, has no
    /// weight and adds 0.
    ///
    /// Throws std::out_of_range for a row outside the plan, std::invalid_argument for a row whose
    /// length is not `seq_length`, TokenIdError for a token outside the vocabulary, and whatever
    /// `IndexedDataset::copy_tokens` and `WordStarts::copy` throw.
    std::uint64_t fill(const BatchArrays& batch) const;

  private:
    struct Scratch {
        std::vector<Segment> segments;
        std::vector<Segment> next_segments;  ///< of the next row
        std::vector<Text> texts;
        std::vector<std::uint8_t> word_starts;  ///< one per slot
        Masker::Scratch masking;
    };

    struct RowArrays {
        std::span<std::int32_t> tokens;
        std::span<std::int32_t> positions;
        MaskedSlots slots;
    };

    /// Looks up a row's segments and prefetches their tokens.
    void find_segments(std::int64_t number, std::vector<Segment>& segments) const;
    /// Fills the row of `scratch.segments` and returns its hash.
    std::uint64_t fill_row(std::int64_t number, const RowArrays& row, Scratch& scratch) const;
    void fill_surplus(const RowArrays& row) const;
    /// Writes the row's segments and padding, unmasked, and records where text is in the row.
    void write_segments(const RowArrays& row, Scratch& scratch) const;
    /// The stage of a row; its rows must have `seq_length` slots.
    std::size_t stage_of(std::int64_t row, std::size_t seq_length) const;
    void check_tokens(const Segment& segment, std::span<const std::int32_t> tokens) const;

    std::vector<CorpusFiles> corpora_;
    std::shared_ptr<const RowPlan> plan_;
    Masker masker_;
    std::vector<double> probabilities_;
    std::uint64_t seed_;
};

}  // namespace megatron_bert
