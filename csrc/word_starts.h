// Where words begin according to a dictionary, found when the text was tokenized: one bit for each
// token of a dataset, in a file beside its .bin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "stored_file.h"

namespace megatron_bert {

/// A `.words` file: bit `k % 8` of byte `k / 8` is 1 if a word begins at token k of the .bin.
class WordStarts {
  public:
    /// Throws std::system_error if the file cannot be read and std::runtime_error, naming it, if it
    /// does not have one bit for each of `num_tokens` tokens.
    WordStarts(const std::string& path, std::int64_t num_tokens,
               FileAccess access = FileAccess::map)
        : bits_(path, access), num_tokens_(num_tokens) {
        bits_.expect_random_reads();
        const auto expected = static_cast<std::size_t>((num_tokens + 7) / 8);
        if (bits_.size() != expected) {
            throw std::runtime_error(path + ": " + std::to_string(bits_.size()) +
                                     " bytes, expected " + std::to_string(expected) +
                                     ", a bit for each of " + std::to_string(num_tokens) +
                                     " tokens (truncated, or of another set)");
        }
    }

    std::int64_t num_tokens() const noexcept { return num_tokens_; }

    /// Writes 1 or 0 for each token from number `first` on. Throws as `StoredFile::read`.
    void copy(std::int64_t first, std::span<std::uint8_t> starts) const {
        const auto token = static_cast<std::size_t>(first);
        if (const std::byte* mapped = bits_.mapped(); mapped != nullptr) {
            unpack(mapped + token / 8, token % 8, starts);
            return;
        }
        std::vector<std::byte> bytes((token % 8 + starts.size() + 7) / 8);
        bits_.read(token / 8, bytes);
        unpack(bytes.data(), token % 8, starts);
    }

    /// Throws as `StoredFile::check_unchanged`.
    void check_unchanged() const { bits_.check_unchanged(); }

  private:
    static void unpack(const std::byte* bytes, std::size_t bit,
                       std::span<std::uint8_t> starts) noexcept {
        for (std::uint8_t& start : starts) {
            start = static_cast<std::uint8_t>(bytes[bit / 8]) >> (bit % 8) & 1;
            ++bit;
        }
    }

    StoredFile bits_;
    std::int64_t num_tokens_;
};

}  // namespace megatron_bert
