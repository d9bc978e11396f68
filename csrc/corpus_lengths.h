// Document lengths: all that planning needs to know of a corpus.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "indexed_dataset.h"
#include "random.h"

namespace megatron_bert {

/// Divides documents into a part to train on and a held-out one, by a hash of their number that no
/// seed changes: a document stays on its side whatever the run.
class HeldOutSplit {
  public:
    /// All documents are on one side.
    HeldOutSplit() = default;

    /// The held-out side has about `fraction` of the documents, the other the rest.
    /// Throws std::invalid_argument unless 0 <= fraction < 1.
    HeldOutSplit(double fraction, bool held_out) : held_out_(held_out) {
        if (!(fraction >= 0 && fraction < 1)) {
            throw std::invalid_argument("the held-out fraction must be in [0, 1), got " +
                                        std::to_string(fraction));
        }
        held_out_below_ = static_cast<std::uint64_t>(fraction * 18446744073709551616.0);
    }

    bool is_whole() const noexcept { return held_out_below_ == 0 && !held_out_; }

    bool has(std::int64_t document) const noexcept {
        return is_whole() ||
               (mix(static_cast<std::uint64_t>(document) + golden_step) < held_out_below_) ==
                   held_out_;
    }

  private:
    std::uint64_t held_out_below_ = 0;
    bool held_out_ = false;
};

/// The lengths, in tokens, of a corpus' documents: those of an opened dataset or of an array (a
/// length-only source). Documents of the other side of a split have none. Views, without copying,
/// what it keeps alive.
class CorpusLengths {
  public:
    explicit CorpusLengths(std::shared_ptr<const IndexedDataset> dataset, HeldOutSplit split = {})
        : dataset_(dataset.get()), split_(split), num_documents_(dataset->num_documents()) {
        if (dataset->one_sequence_per_document()) {
            layout_ = Layout::int32;
            data_ = dataset->lengths_data();
        }
        if (split.is_whole()) {
            num_tokens_ = dataset->num_tokens();
        } else {
            add_up();
        }
        owner_ = std::move(dataset);
    }

    /// `owner` keeps `lengths` alive. Throws std::invalid_argument for a negative length.
    CorpusLengths(std::span<const std::int32_t> lengths, std::shared_ptr<const void> owner)
        : CorpusLengths(Layout::int32, std::as_bytes(lengths).data(), lengths.size(),
                        std::move(owner)) {}

    CorpusLengths(std::span<const std::int64_t> lengths, std::shared_ptr<const void> owner)
        : CorpusLengths(Layout::int64, std::as_bytes(lengths).data(), lengths.size(),
                        std::move(owner)) {}

    std::int64_t num_documents() const noexcept { return num_documents_; }
    std::int64_t num_tokens() const noexcept { return num_tokens_; }

    /// The dataset that the lengths are of; null for a length-only source.
    const IndexedDataset* dataset() const noexcept { return dataset_; }

    std::int64_t operator[](std::int64_t document) const noexcept {
        return split_.has(document) ? length(document) : 0;
    }

    /// How many of a document's tokens from `offset` on to take where there is room for `room`, fewer
    /// than are left: up to the end of a sentence, if the set has sentences and one ends among the
    /// last `slack` tokens; else all that there is room for.
    std::int64_t cut(std::int64_t document, std::int64_t offset, std::int64_t room,
                     std::int64_t slack) const noexcept {
        if (layout_ != Layout::dataset) {
            return room;
        }
        const std::int64_t end = dataset_->last_sequence_end(document, offset + room) - offset;
        return end > 0 && end >= room - slack ? end : room;
    }

  private:
    enum class Layout { int32, int64, dataset };

    std::int64_t length(std::int64_t document) const noexcept {
        switch (layout_) {
            case Layout::int32:
                return load<std::int32_t>(data_ + 4 * document);
            case Layout::int64:
                return load<std::int64_t>(data_ + 8 * document);
            case Layout::dataset:
                break;
        }
        return dataset_->document_length(document);
    }

    CorpusLengths(Layout layout, const std::byte* data, std::size_t size,
                  std::shared_ptr<const void> owner)
        : layout_(layout),
          data_(data),
          num_documents_(static_cast<std::int64_t>(size)),
          owner_(std::move(owner)) {
        add_up();
    }

    void add_up() {
        for (std::int64_t document = 0; document < num_documents_; ++document) {
            const std::int64_t length = (*this)[document];
            if (length < 0 || length > max_tokens - num_tokens_) {
                throw std::invalid_argument("document " + std::to_string(document) +
                                            " has the length " + std::to_string(length));
            }
            num_tokens_ += length;
        }
    }

    /// Far above any corpus, low enough for sums of several to stay in range.
    static constexpr std::int64_t max_tokens = std::int64_t{1} << 56;

    Layout layout_ = Layout::dataset;
    const std::byte* data_ = nullptr;
    const IndexedDataset* dataset_ = nullptr;
    HeldOutSplit split_;
    std::int64_t num_documents_ = 0;
    std::int64_t num_tokens_ = 0;
    std::shared_ptr<const void> owner_;
};

}  // namespace megatron_bert
