// The content of every row of a run, as a function of (document lengths, stages, seed, row number).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "blend.h"
#include "corpus_lengths.h"
#include "corpus_stream.h"

namespace megatron_bert {

/// A curriculum stage: `rows` rows of `seq_length` slots.
struct Stage {
    std::int64_t seq_length = 0;
    std::int64_t rows = 0;
};

/// A run of a document's tokens in a row; [CLS] and [SEP] around it are implied.
struct Segment {
    std::size_t corpus = 0;
    Span span;
};

/// The rows that one corpus has in one stage.
///
/// Rows are cut in stream order and visited in a pseudo-random order within windows. A window has
/// `window_rows` rows (fewer where an epoch ends) whether or not the stage reads all of them, so
/// that lengthening a stage changes no row before its old end. The rows of its last window that a
/// stage does not read are carried to the next stage. Only every `anchor_rows`-th row's place is
/// stored; the others are found by cutting again from there.
class CorpusStage {
  public:
    /// Identifies the stage within the run; its random keys are made from this.
    struct Id {
        std::uint64_t seed = 0;
        std::size_t corpus = 0;
        std::size_t stage = 0;
    };

    static constexpr std::int64_t window_rows = 16384;
    static constexpr std::int64_t anchor_rows = 64;
    static_assert(window_rows % anchor_rows == 0);

    /// `lengths` must outlive the object and hold at least one token.
    CorpusStage(const CorpusLengths& lengths, Id id, Stage stage, StreamStart start);

    // The epochs point to the carried spans: moving leaves these in place, a copy would not.
    CorpusStage(const CorpusStage&) = delete;
    CorpusStage(CorpusStage&&) = default;

    /// Appends the segments of row `row`, 0 <= row < stage.rows.
    void append_segments(std::int64_t row, std::vector<Segment>& segments) const;

    /// Where the corpus' next stage begins.
    StreamStart next_start() const;

    /// Tokens in the rows that the stage reads.
    std::int64_t tokens_read() const noexcept { return tokens_read_; }

  private:
    struct Window {
        std::int64_t first_row = 0;
        std::size_t epoch = 0;  ///< counted from the stage's first epoch
        std::size_t first_anchor = 0;
    };

    void cut_windows();
    /// Maps the number of a visit in the window to a row in cutting order.
    Permutation row_order(std::size_t window) const noexcept;
    std::int64_t window_size(std::size_t window) const noexcept;
    void add_epoch();
    /// A cutter that starts at a place in one of the stage's epochs, counted from its first.
    RowCutter cutter(std::size_t epoch, RowCutter::Place place) const noexcept;
    std::vector<bool> unread_rows_of_last_window() const;

    const CorpusLengths* lengths_;
    Id id_;
    Stage stage_;
    StreamStart start_;
    std::int64_t first_epoch_;
    std::vector<EpochPieces> epochs_;
    std::vector<Window> windows_;
    std::vector<RowCutter::Place> anchors_;
    std::int64_t num_rows_cut_ = 0;
    std::int64_t tokens_read_ = 0;
};

/// All rows of a run. Building it reads every document's length about once per epoch; a row is then
/// found in constant time. Const methods are thread-safe.
class RowPlan {
  public:
    /// Throws std::invalid_argument for a corpus without tokens, a weight that is not positive, a
    /// row too short for a segment, or different numbers of corpora and weights.
    RowPlan(std::vector<CorpusLengths> corpora, std::vector<double> weights,
            std::vector<Stage> stages, std::uint64_t seed);

    // Stages point into the corpora.
    RowPlan(const RowPlan&) = delete;
    RowPlan& operator=(const RowPlan&) = delete;

    struct StageRow {
        std::size_t stage = 0;
        std::int64_t row = 0;  ///< within the stage
    };

    std::int64_t num_rows() const noexcept { return first_rows_.back(); }
    const std::vector<CorpusLengths>& corpora() const noexcept { return corpora_; }
    const std::vector<Stage>& stages() const noexcept { return stages_; }

    /// The stage of a row of the run. Throws std::out_of_range outside [0, num_rows()).
    StageRow stage_of(std::int64_t row) const;

    /// Replaces `segments` with those of a row of the run, in order.
    /// Throws std::out_of_range outside [0, num_rows()).
    void segments(std::int64_t row, std::vector<Segment>& segments) const;

    /// For each corpus, how many times over the run reads its tokens.
    std::vector<double> epochs() const;

  private:
    void check() const;
    void plan_corpora(std::uint64_t seed);
    std::vector<CorpusStage> plan_corpus(std::size_t corpus, std::uint64_t seed) const;

    std::vector<CorpusLengths> corpora_;
    std::vector<double> weights_;
    std::vector<Stage> stages_;
    std::vector<std::int64_t> first_rows_;  ///< of each stage, then the number of all rows
    std::vector<Blend> blends_;             ///< of each stage
    std::vector<std::vector<CorpusStage>> corpus_stages_;  ///< by corpus, then stage
};

/// How many rows of `seq_length` slots the first epoch of a corpus takes in the plan of a run with
/// `seed` in which it is corpus number `corpus`; `limit` if there are more.
std::int64_t epoch_rows(const CorpusLengths& lengths, std::int64_t seq_length, std::uint64_t seed,
                        std::size_t corpus, std::int64_t limit);

}  // namespace megatron_bert
