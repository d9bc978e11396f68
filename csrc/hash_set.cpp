#include "hash_set.h"

#include <algorithm>
#include <stdexcept>

namespace megatron_bert {

namespace {

// A shard is filled up to 17/20 and grows by 5/4, so it is always at least 0.68 full: 16 / 0.68 =
// 23.5 bytes.
constexpr std::size_t smallest_shard = 16;

// Enough to hide the memory's latency behind the work on the hashes before.
constexpr std::size_t prefetch_distance = 8;

/// The preferred slot of a hash. It is proportional to the hash, so that shards can have any size
/// and growing one reads and writes it from front to back.
std::size_t home(Hash hash, std::size_t num_slots) noexcept {
    __extension__ using uint128 = unsigned __int128;
    return static_cast<std::size_t>((static_cast<uint128>(hash.low) * num_slots) >> 64);
}

/// The slot that holds the hash, or the free one where it belongs.
std::size_t find(const std::vector<Hash>& slots, Hash hash) noexcept {
    std::size_t slot = home(hash, slots.size());
    while (slots[slot] != Hash{} && slots[slot] != hash) {
        slot = slot + 1 == slots.size() ? 0 : slot + 1;
    }
    return slot;
}

}  // namespace

bool HashSet::Shard::insert(Hash hash) {
    if (size_ * 20 >= slots_.size() * 17) {
        grow();
    }
    Hash& slot = slots_[find(slots_, hash)];
    if (slot == hash) {
        return false;
    }
    slot = hash;
    ++size_;
    return true;
}

void HashSet::Shard::prefetch(Hash hash) const noexcept {
    if (!slots_.empty()) {
        __builtin_prefetch(&slots_[home(hash, slots_.size())]);
    }
}

void HashSet::Shard::grow() {
    std::vector<Hash> larger(std::max(smallest_shard, slots_.size() + slots_.size() / 4));
    for (const Hash hash : slots_) {
        if (hash != Hash{}) {
            larger[find(larger, hash)] = hash;
        }
    }
    slots_.swap(larger);
}

void HashSet::insert(std::span<const std::uint64_t> words, std::span<bool> is_new) {
    const std::size_t count = is_new.size();
    if (words.size() != 2 * count) {
        throw std::invalid_argument("a hash has two words");
    }
    const auto hash_at = [words](std::size_t k) { return Hash{words[2 * k], words[2 * k + 1]}; };
    const std::lock_guard lock(mutex_);
    for (std::size_t k = 0; k < count; ++k) {
        if (k + prefetch_distance < count) {
            const Hash ahead = hash_at(k + prefetch_distance);
            shard_of(ahead).prefetch(ahead);
        }
        const Hash hash = hash_at(k);
        if (hash == Hash{}) {
            is_new[k] = !has_zero_;
            has_zero_ = true;
        } else {
            is_new[k] = shard_of(hash).insert(hash);
        }
    }
}

std::size_t HashSet::size() const {
    const std::lock_guard lock(mutex_);
    std::size_t size = has_zero_ ? 1 : 0;
    for (const Shard& shard : shards_) {
        size += shard.size();
    }
    return size;
}

std::size_t HashSet::memory_bytes() const {
    const std::lock_guard lock(mutex_);
    std::size_t bytes = sizeof(*this);
    for (const Shard& shard : shards_) {
        bytes += shard.memory_bytes();
    }
    return bytes;
}

}  // namespace megatron_bert
