// A corpus as an endless stream of documents, epoch after epoch, and the cutting of rows from it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "corpus_lengths.h"
#include "permutation.h"

namespace megatron_bert {

/// A run of tokens of one document.
struct Span {
    std::int64_t document = 0;
    std::int64_t offset = 0;
    std::int64_t length = 0;

    friend bool operator==(const Span&, const Span&) = default;
};

/// Where a corpus' stream is when a stage begins: first the spans that earlier stages cut into rows
/// but did not read, all from one epoch; then the documents not yet begun.
struct StreamStart {
    std::vector<Span> carried;
    std::int64_t carried_epoch = 0;
    std::int64_t epoch = 0;     ///< of the first document not yet begun: carried_epoch or the next
    std::int64_t position = 0;  ///< of that document in its epoch's order
};

/// The order in which an epoch visits a corpus' documents.
///
/// Groups of neighbouring documents are permuted instead of single documents, so that lengths and
/// tokens are read in runs rather than with a cache miss each.
class DocumentOrder {
  public:
    DocumentOrder(std::int64_t num_documents, std::uint64_t key) noexcept
        : group_size_(std::clamp<std::int64_t>(num_documents / 4096, 1, 32)),
          groups_(static_cast<std::uint64_t>((num_documents + group_size_ - 1) / group_size_), key),
          last_group_(static_cast<std::int64_t>(groups_.size()) - 1),
          last_group_size_(num_documents - last_group_ * group_size_),
          last_group_place_(num_documents == 0 ? 0 : last_group_place()) {}

    /// Positions [begin, end) of the order hold consecutive documents from `first_document` on.
    struct Run {
        std::int64_t begin = 0;
        std::int64_t end = 0;
        std::int64_t first_document = 0;
    };

    /// The run that holds `position`, which must be in [0, num_documents).
    Run run_at(std::int64_t position) const noexcept {
        // Only the last group may be short; positions after it are shifted by its shortage.
        const std::int64_t last_group_begin = last_group_place_ * group_size_;
        const std::int64_t shortage = group_size_ - last_group_size_;
        const bool after_last_group = position >= last_group_begin + last_group_size_;
        const std::int64_t place = (position + (after_last_group ? shortage : 0)) / group_size_;
        const std::int64_t begin = place * group_size_ - (after_last_group ? shortage : 0);
        const std::int64_t size = place == last_group_place_ ? last_group_size_ : group_size_;
        const auto group =
            static_cast<std::int64_t>(groups_(static_cast<std::uint64_t>(place)));
        return {begin, begin + size, group * group_size_};
    }

  private:
    std::int64_t last_group_place() const noexcept {
        return static_cast<std::int64_t>(groups_.inverse(static_cast<std::uint64_t>(last_group_)));
    }

    std::int64_t group_size_;
    Permutation groups_;
    std::int64_t last_group_;
    std::int64_t last_group_size_;
    std::int64_t last_group_place_;
};

/// What one epoch contributes to a stage, as one numbered list of pieces: its carried spans, then
/// its documents.
class EpochPieces {
  public:
    EpochPieces(const CorpusLengths& lengths, const StreamStart& start, std::int64_t epoch,
                std::uint64_t order_key) noexcept
        : lengths_(&lengths),
          carried_(epoch == start.carried_epoch ? start.carried.data() : nullptr),
          num_carried_(carried_ == nullptr ? 0 : static_cast<std::int64_t>(start.carried.size())),
          first_position_(epoch == start.epoch ? start.position : 0),
          size_(num_carried_ + (epoch < start.epoch ? 0 : lengths.num_documents() - first_position_)),
          order_(lengths.num_documents(), order_key) {}

    const CorpusLengths& lengths() const noexcept { return *lengths_; }
    std::int64_t size() const noexcept { return size_; }
    std::int64_t num_carried() const noexcept { return num_carried_; }

    /// The position in the epoch's order of a piece that is a document.
    std::int64_t position_of(std::int64_t piece) const noexcept {
        return first_position_ + piece - num_carried_;
    }

    /// Piece number `piece` < size(). Fastest when called with ascending numbers.
    Span at(std::int64_t piece) noexcept {
        if (piece < num_carried_) {
            return carried_[piece];
        }
        const std::int64_t position = position_of(piece);
        if (position < run_.begin || position >= run_.end) {
            run_ = order_.run_at(position);
        }
        const std::int64_t document = run_.first_document + (position - run_.begin);
        return {document, 0, (*lengths_)[document]};
    }

  private:
    const CorpusLengths* lengths_;
    const Span* carried_;
    std::int64_t num_carried_;
    std::int64_t first_position_;
    std::int64_t size_;
    DocumentOrder order_;
    DocumentOrder::Run run_;
};

/// Slots that a segment's [CLS] and [SEP] take, and the fewest a segment can have.
inline constexpr std::int64_t segment_overhead = 2;
inline constexpr std::int64_t min_segment_slots = segment_overhead + 1;

/// At most one slot in this many may stay empty so that a row ends with a sentence.
inline constexpr std::int64_t slots_per_slack = 64;

/// Cuts an epoch into rows, one after the other.
class RowCutter {
  public:
    /// A place between two tokens of an epoch.
    struct Place {
        std::int64_t piece = 0;
        std::int64_t offset = 0;  ///< tokens of the piece before the place
    };

    RowCutter(EpochPieces pieces, Place place) noexcept
        : pieces_(pieces), index_(place.piece), offset_(place.offset) {
        load_piece();
    }

    /// Whether no tokens are left.
    bool at_end() const noexcept { return index_ == pieces_.size(); }

    /// Where the next row begins: at the start of, or within, a piece that has tokens left.
    Place place() const noexcept { return {index_, offset_}; }

    const EpochPieces& pieces() const noexcept { return pieces_; }

    /// What is left of the piece at `place()`.
    Span rest_of_piece() const noexcept {
        return {piece_.document, piece_.offset + offset_, piece_.length - offset_};
    }

    /// Skips what is left of the piece at `place()`.
    void skip_piece() noexcept {
        ++index_;
        offset_ = 0;
        load_piece();
    }

    /// Cuts one row of `seq_length` slots and calls `emit(Span)` for each of its segments: whole
    /// pieces while there is room, then the beginning of the next piece.
    template <typename Emit>
    void cut_row(std::int64_t seq_length, Emit&& emit) {
        std::int64_t free = seq_length;
        while (free >= min_segment_slots && !at_end()) {
            const Span rest = rest_of_piece();
            const std::int64_t room = free - segment_overhead;
            if (rest.length > room) {
                const std::int64_t length = pieces_.lengths().cut(
                    rest.document, rest.offset, room, seq_length / slots_per_slack);
                emit(Span{rest.document, rest.offset, length});
                offset_ += length;
                return;
            }
            emit(rest);
            free -= rest.length + segment_overhead;
            skip_piece();
        }
    }

  private:
    /// Fetches the piece at `index_`, skipping empty documents.
    void load_piece() noexcept {
        for (; index_ < pieces_.size(); ++index_) {
            piece_ = pieces_.at(index_);
            if (piece_.length > 0) {
                return;
            }
        }
    }

    EpochPieces pieces_;
    std::int64_t index_;
    std::int64_t offset_;
    Span piece_;
};

}  // namespace megatron_bert
