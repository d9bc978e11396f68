// Reader of Megatron-LM's indexed datasets: PREFIX.bin holds tokens and nothing else, PREFIX.idx
// says where each sequence and each document begins.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "dataset_index.h"
#include "stored_file.h"

namespace megatron_bert {

/// A dataset opened for reading. Both files stay mapped and nothing is copied; if the system
/// refuses to map them, the index is read into memory and tokens are read on demand.
///
/// A damaged or unrelated file is refused when the dataset is opened. Const methods are
/// thread-safe.
class IndexedDataset {
  public:
    /// Opens `prefix`.idx and `prefix`.bin.
    ///
    /// Throws std::system_error if a file cannot be read and std::runtime_error, naming the file
    /// and what is wrong in it, if the files are not a valid dataset.
    explicit IndexedDataset(std::string prefix, FileAccess access = FileAccess::map);

    const std::string& prefix() const noexcept { return prefix_; }
    std::int64_t num_documents() const noexcept { return index_.num_documents(); }
    std::int64_t num_sequences() const noexcept { return index_.num_sequences(); }
    std::int64_t num_tokens() const noexcept { return index_.num_tokens(); }
    TokenType token_type() const noexcept { return index_.token_type(); }

    /// Whether tokens are read from a map rather than by system calls.
    bool is_mapped() const noexcept { return token_file_.is_mapped(); }

    /// Tokens of a document: all its sequences joined.
    std::int64_t document_length(std::int64_t document) const noexcept {
        return index_.document_length(document);
    }

    /// Number of the document's first token within .bin; for `num_documents()`, the end of .bin.
    std::int64_t document_begin(std::int64_t document) const noexcept {
        return index_.document_begin(document);
    }

    /// The last end of a sequence (a sentence, if the dataset has them) within a document's first
    /// `tokens` tokens, counted in tokens from the document's beginning; 0 if there is none.
    std::int64_t last_sequence_end(std::int64_t document, std::int64_t tokens) const noexcept {
        return index_.last_sequence_end(document, tokens);
    }

    /// Prefetches the beginning of a range of tokens into the cache, if the file is mapped, so that
    /// `copy_tokens` waits less.
    void prefetch_tokens(std::int64_t document, std::int64_t offset,
                         std::int64_t length) const noexcept;

    /// Copies `length` tokens of a document, from its token `offset` on, to `tokens`.
    /// The range must be within the document.
    ///
    /// Throws std::system_error or std::runtime_error, naming the file, if a file that is not
    /// mapped cannot be read there.
    void copy_tokens(std::int64_t document, std::int64_t offset, std::int64_t length,
                     std::int32_t* tokens) const;

    /// The largest token id of about `sample_documents` evenly spaced documents (of all, if there
    /// are fewer), -1 if they hold no token. A negative id, never valid, counts as its unsigned
    /// value, so that it is larger than any vocabulary. Throws as `copy_tokens`.
    std::int64_t max_token_id(std::int64_t sample_documents) const;

    /// Throws std::runtime_error, saying what happened, if a file was truncated, modified, replaced
    /// or removed since the dataset was opened. Costs two system calls.
    void check_unchanged() const;

    /// Whether every document is one sequence, which makes `lengths_data` the documents' lengths.
    bool one_sequence_per_document() const noexcept { return index_.one_sequence_per_document(); }

    /// The stored i32 sequence lengths, at any alignment.
    const std::byte* lengths_data() const noexcept { return index_.lengths_data(); }

  private:
    /// Byte offset of a document's token in .bin.
    std::size_t byte_of(std::int64_t document, std::int64_t offset) const noexcept {
        return static_cast<std::size_t>((index_.document_begin(document) + offset) *
                                        bytes_of(token_type()));
    }

    std::string prefix_;
    StoredFile index_file_;
    StoredFile token_file_;
    DatasetIndex index_;
};

}  // namespace megatron_bert
