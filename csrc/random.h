// Randomness as a function of its purpose, never as a stream whose state has to be kept.
#pragma once

#include <concepts>
#include <cstdint>

namespace megatron_bert {

/// A 64-bit bijection whose output bits look independent of its input: the finaliser of SplitMix64
/// (Steele, Lea, Flood 2014, with Stafford's constants "mix13").
constexpr std::uint64_t mix(std::uint64_t value) noexcept {
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9U;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebU;
    return value ^ (value >> 31);
}

/// 2^64 divided by the golden ratio: the step of SplitMix64's counter.
inline constexpr std::uint64_t golden_step = 0x9e3779b97f4a7c15U;

/// What a key is for; keys of different purposes are unrelated.
enum class Purpose : std::uint64_t { document_order = 1, row_order = 2, masking = 3 };

/// A key from the run's seed, a purpose, and the numbers that distinguish its uses.
template <std::integral... Numbers>
constexpr std::uint64_t random_key(std::uint64_t seed, Purpose purpose, Numbers... numbers) noexcept {
    std::uint64_t key = mix(seed + golden_step);
    key = mix(key + static_cast<std::uint64_t>(purpose) * golden_step);
    ((key = mix(key + (static_cast<std::uint64_t>(numbers) + 1) * golden_step)), ...);
    return key;
}

/// The sequence of random numbers that belongs to one key.
class CounterRandom {
  public:
    explicit constexpr CounterRandom(std::uint64_t key) noexcept : state_(key) {}

    /// 64 random bits.
    constexpr std::uint64_t next() noexcept {
        state_ += golden_step;
        return mix(state_);
    }

    /// A number in [0, bound), bound > 0 (Lemire 2019, without the rejection: the bias is below
    /// bound / 2^64).
    constexpr std::uint64_t below(std::uint64_t bound) noexcept {
        __extension__ using uint128 = unsigned __int128;
        return static_cast<std::uint64_t>((static_cast<uint128>(next()) * bound) >> 64);
    }

  private:
    std::uint64_t state_;
};

}  // namespace megatron_bert
