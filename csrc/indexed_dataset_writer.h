// Writer of Megatron-LM's indexed datasets, one sequence a document.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "indexed_dataset.h"

namespace megatron_bert {

/// A file written under a temporary name in its final folder, which takes its final name only when
/// it is complete and on the disk. Without `commit()` nothing is left behind.
class AtomicFile {
  public:
    explicit AtomicFile(std::string path);
    AtomicFile(const AtomicFile&) = delete;
    AtomicFile& operator=(const AtomicFile&) = delete;
    ~AtomicFile();

    void append(const void* data, std::size_t size);
    /// Writes what is buffered and waits until the disk has it.
    void sync();
    /// Gives the file its final name; call `sync()` first.
    void commit();

  private:
    void flush();
    [[noreturn]] void fail(const std::string& action) const;

    std::string path_;
    std::string temporary_path_;
    int descriptor_ = -1;
    std::vector<std::byte> buffer_;
};

/// Appends documents to a new dataset. The files appear under their names, whole, on `close()`;
/// a writer destroyed without it leaves nothing.
class IndexedDatasetWriter {
  public:
    /// Throws std::system_error when a file cannot be created.
    IndexedDatasetWriter(std::string prefix, TokenType token_type);

    /// Appends one document (it may be empty). Throws std::invalid_argument, having written
    /// nothing of the document, for an id that the token type cannot hold.
    void add_document(std::span<const std::int32_t> tokens);

    /// Appends documents that stand one after the other in `tokens`, `lengths[k]` tokens each.
    void add_documents(std::span<const std::int32_t> tokens, std::span<const std::int64_t> lengths);

    /// Waits until the disk has the whole dataset, still under temporary names; nothing can be added
    /// then. What can fail for want of space fails here, while a dataset of the same name is whole.
    void finish();

    /// Finishes the dataset and names it: .bin, then .idx; replaces a dataset of the same name.
    void close();

  private:
    enum class State { open, finished, closed };

    void check_open() const;
    void write_index();

    std::string prefix_;
    TokenType token_type_;
    AtomicFile tokens_;
    AtomicFile index_;
    std::vector<std::int32_t> lengths_;
    State state_ = State::open;
};

}  // namespace megatron_bert
