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

namespace megatron_bert {

/// The lengths, in tokens, of a corpus' documents: those of an opened dataset or of an array (a
/// length-only source). Views, without copying, what it keeps alive.
class CorpusLengths {
  public:
    explicit CorpusLengths(std::shared_ptr<const IndexedDataset> dataset)
        : dataset_(dataset.get()),
          num_documents_(dataset->num_documents()),
          num_tokens_(dataset->num_tokens()) {
        if (dataset->one_sequence_per_document()) {
            layout_ = Layout::int32;
            data_ = dataset->lengths_data();
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

    std::int64_t operator[](std::int64_t document) const noexcept {
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

  private:
    enum class Layout { int32, int64, dataset };

    CorpusLengths(Layout layout, const std::byte* data, std::size_t size,
                  std::shared_ptr<const void> owner)
        : layout_(layout),
          data_(data),
          num_documents_(static_cast<std::int64_t>(size)),
          owner_(std::move(owner)) {
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
    std::int64_t num_documents_ = 0;
    std::int64_t num_tokens_ = 0;
    std::shared_ptr<const void> owner_;
};

}  // namespace megatron_bert
