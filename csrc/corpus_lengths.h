// Document lengths: all that planning needs to know about a corpus.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "held_out_split.h"
#include "indexed_dataset.h"

namespace megatron_bert {

/// The lengths, in tokens, of a corpus' documents: of an opened dataset, of one side of its
/// held-out split, or from an array (a length-only source). A view without copies; it keeps its
/// source alive.
///
/// On the training side, held-out documents count as having no tokens. The held-out side, which is
/// the smaller one, has a list of its documents, and they are numbered by their place in it.
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
            if (split.is_held_out()) {
                list_held_out();
            }
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

    /// Documents that have a token. Reads all lengths.
    std::int64_t count_nonempty_documents() const noexcept {
        std::int64_t count = 0;
        for (std::int64_t document = 0; document < num_documents_; ++document) {
            count += (*this)[document] > 0 ? 1 : 0;
        }
        return count;
    }

    /// The document's number in its dataset.
    std::int64_t number_of(std::int64_t document) const noexcept {
        return held_out_ == nullptr ? document : (*held_out_)[static_cast<std::size_t>(document)];
    }

    /// Whether the dataset's document with that number is on this side.
    bool has(std::int64_t number) const noexcept { return split_.has(number); }

    std::int64_t operator[](std::int64_t document) const noexcept {
        if (held_out_ != nullptr) {
            return length(number_of(document));
        }
        return split_.has(document) ? length(document) : 0;
    }

    /// How many of a document's tokens from `offset` on to take if there is room for `room`, which
    /// is fewer than are left: up to the end of a sentence, if the dataset has sentences and one
    /// ends within the last `slack` tokens of the room; else `room`.
    std::int64_t cut(std::int64_t document, std::int64_t offset, std::int64_t room,
                     std::int64_t slack) const noexcept {
        if (layout_ != Layout::dataset) {
            return room;
        }
        const std::int64_t end =
            dataset_->last_sequence_end(number_of(document), offset + room) - offset;
        return end > 0 && end >= room - slack ? end : room;
    }

    /// Whether these are the lengths of that dataset's documents. Compares all lengths if they come
    /// from an array.
    bool are_of(const IndexedDataset& dataset) const noexcept {
        if (dataset_ != nullptr) {
            return dataset_ == &dataset;
        }
        if (num_documents_ != dataset.num_documents()) {
            return false;
        }
        for (std::int64_t document = 0; document < num_documents_; ++document) {
            if (length(document) != dataset.document_length(document)) {
                return false;
            }
        }
        return true;
    }

  private:
    enum class Layout { int32, int64, dataset };

    CorpusLengths(Layout layout, const std::byte* data, std::size_t size,
                  std::shared_ptr<const void> owner)
        : layout_(layout),
          data_(data),
          num_documents_(static_cast<std::int64_t>(size)),
          owner_(std::move(owner)) {
        add_up();
    }

    void list_held_out() {
        auto documents = std::make_shared<std::vector<std::int64_t>>();
        for (std::int64_t document = 0; document < num_documents_; ++document) {
            if (split_.has(document)) {
                documents->push_back(document);
            }
        }
        num_documents_ = static_cast<std::int64_t>(documents->size());
        held_out_ = std::move(documents);
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

    std::int64_t length(std::int64_t number) const noexcept {
        switch (layout_) {
            case Layout::int32:
                return load<std::int32_t>(data_ + 4 * number);
            case Layout::int64:
                return load<std::int64_t>(data_ + 8 * number);
            case Layout::dataset:
                break;
        }
        return dataset_->document_length(number);
    }

    /// Far more than any corpus has, but low enough that sums over several stay in range.
    static constexpr std::int64_t max_tokens = std::int64_t{1} << 56;

    Layout layout_ = Layout::dataset;
    const std::byte* data_ = nullptr;
    const IndexedDataset* dataset_ = nullptr;
    HeldOutSplit split_;
    std::shared_ptr<const std::vector<std::int64_t>> held_out_;
    std::int64_t num_documents_ = 0;
    std::int64_t num_tokens_ = 0;
    std::shared_ptr<const void> owner_;
};

}  // namespace megatron_bert
