// Proves the permutation while it is compiled: there is nothing to run.
#include <cstdint>

#include "permutation.h"

namespace {

constexpr bool is_bijection(std::uint64_t size, std::uint64_t key) {
    const megatron_bert::Permutation permutation(size, key);
    for (std::uint64_t value = 0; value < size; ++value) {
        // With an inverse on both sides it is one to one and onto.
        if (permutation(value) >= size || permutation.inverse(permutation(value)) != value ||
            permutation(permutation.inverse(value)) != value) {
            return false;
        }
    }
    return true;
}

constexpr bool all_sizes_are_bijections() {
    for (std::uint64_t size = 1; size <= 70; ++size) {
        for (std::uint64_t key = 0; key < 3; ++key) {
            if (!is_bijection(size, key)) {
                return false;
            }
        }
    }
    return true;
}

static_assert(all_sizes_are_bijections());
static_assert(is_bijection(1000, 42));

}  // namespace
