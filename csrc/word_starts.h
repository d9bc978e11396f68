// Where words begin, as a dictionary saw it when the text was tokenized: one bit for each token of a
// dataset, beside its .bin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "mapped_file.h"

namespace megatron_bert {

/// A `.words` file: bit `k % 8` of byte `k / 8` is 1 if a word begins at token k of the .bin.
class WordStarts {
  public:
    /// Throws std::system_error when the file cannot be read and std::runtime_error, naming it, when
    /// it has not one bit for each of `num_tokens` tokens.
    WordStarts(const std::string& path, std::int64_t num_tokens) : bits_(path) {
        const auto expected = static_cast<std::size_t>((num_tokens + 7) / 8);
        if (bits_.size() != expected) {
            throw std::runtime_error(path + ": " + std::to_string(bits_.size()) +
                                     " bytes, expected " + std::to_string(expected) +
                                     ", a bit for each of " + std::to_string(num_tokens) +
                                     " tokens (truncated, or of another set)");
        }
    }

    /// Writes 1 or 0 for each token from number `first` on.
    void copy(std::int64_t first, std::span<std::uint8_t> starts) const noexcept {
        auto token = static_cast<std::size_t>(first);
        for (std::uint8_t& start : starts) {
            start = static_cast<std::uint8_t>(bits_.data()[token / 8]) >> (token % 8) & 1;
            ++token;
        }
    }

  private:
    MappedFile bits_;
};

}  // namespace megatron_bert
