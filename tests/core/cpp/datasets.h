// Small datasets in a folder that goes with the test.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "dataset_index.h"

namespace megatron_bert::test {

class TemporaryFolder {
  public:
    TemporaryFolder();
    ~TemporaryFolder();

    TemporaryFolder(const TemporaryFolder&) = delete;
    TemporaryFolder& operator=(const TemporaryFolder&) = delete;

    std::string path(const std::string& name) const { return (folder_ / name).string(); }

  private:
    std::filesystem::path folder_;
};

void write_file(const std::string& path, std::span<const std::byte> bytes);

/// Sequences of tokens, and which of them make a document.
struct Content {
    std::vector<std::vector<std::int32_t>> sequences;
    std::vector<std::int64_t> boundaries;

    /// A document's sequences joined.
    std::vector<std::int32_t> document(std::size_t number) const;
    std::size_t num_documents() const { return boundaries.size() - 1; }
    std::int64_t num_tokens() const;
};

/// Documents of up to `most_sequences` sequences (0: one each) of up to `most_tokens` tokens, some
/// of them empty; ids are in [first_id, vocab_size).
Content random_content(std::uint64_t seed, int num_documents, int most_sequences, int most_tokens,
                       std::int32_t first_id, std::int32_t vocab_size);

void write_dataset(const std::string& prefix, TokenType type, const Content& content);

}  // namespace megatron_bert::test
