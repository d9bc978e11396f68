// A pseudo-random permutation that is computed, never stored.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "random.h"

namespace megatron_bert {

/// A keyed permutation of [0, size), in constant memory and, on average, constant time.
///
/// A Feistel network permutes the range up to the next power of two; values that fall outside
/// [0, size) are sent through again until they fall inside ("cycle walking"; Black and Rogaway,
/// Ciphers with Arbitrary Finite Domains, 2002). The power of two is below 2 * size, so fewer than
/// two passes are expected.
class Permutation {
  public:
    constexpr Permutation(std::uint64_t size, std::uint64_t key) noexcept : size_(size) {
        const int bits = size > 1 ? static_cast<int>(std::bit_width(size - 1)) : 0;
        low_bits_ = (bits + 1) / 2;
        low_mask_ = (std::uint64_t{1} << low_bits_) - 1;
        high_mask_ = (std::uint64_t{1} << (bits - low_bits_)) - 1;
        CounterRandom random(key);
        for (std::uint64_t& round_key : round_keys_) {
            round_key = random.next();
        }
    }

    constexpr std::uint64_t size() const noexcept { return size_; }

    /// The image of `value` < size.
    constexpr std::uint64_t operator()(std::uint64_t value) const noexcept {
        do {
            value = encrypt(value);
        } while (value >= size_);
        return value;
    }

    /// The preimage of `value` < size.
    constexpr std::uint64_t inverse(std::uint64_t value) const noexcept {
        do {
            value = decrypt(value);
        } while (value >= size_);
        return value;
    }

  private:
    static constexpr std::size_t num_rounds = 6;

    // Each round XORs one part with a function of the other, so that the same round undoes it.
    constexpr std::uint64_t encrypt(std::uint64_t value) const noexcept {
        std::uint64_t high = value >> low_bits_;
        std::uint64_t low = value & low_mask_;
        for (std::size_t round = 0; round < num_rounds; round += 2) {
            high ^= mix(low + round_keys_[round]) & high_mask_;
            low ^= mix(high + round_keys_[round + 1]) & low_mask_;
        }
        return high << low_bits_ | low;
    }

    constexpr std::uint64_t decrypt(std::uint64_t value) const noexcept {
        std::uint64_t high = value >> low_bits_;
        std::uint64_t low = value & low_mask_;
        for (std::size_t round = num_rounds; round > 0; round -= 2) {
            low ^= mix(high + round_keys_[round - 1]) & low_mask_;
            high ^= mix(low + round_keys_[round - 2]) & high_mask_;
        }
        return high << low_bits_ | low;
    }

    std::uint64_t size_;
    int low_bits_ = 0;
    std::uint64_t low_mask_ = 0;
    std::uint64_t high_mask_ = 0;
    std::array<std::uint64_t, num_rounds> round_keys_{};
};

}  // namespace megatron_bert
