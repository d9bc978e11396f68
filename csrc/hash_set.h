// A set of 128-bit hashes for hundreds of millions of documents.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

namespace megatron_bert {

/// A 128-bit hash, all of whose bits must be as good as random.
struct Hash {
    std::uint64_t high = 0;
    std::uint64_t low = 0;

    bool operator==(const Hash&) const = default;
};

/// A hash table with open addressing, in shards that grow by a quarter, one at a time: 19 to 24
/// bytes a hash once there are some tens of thousands, even while it grows. Calls from several
/// threads are serialised.
class HashSet {
  public:
    HashSet() = default;
    HashSet(const HashSet&) = delete;
    HashSet& operator=(const HashSet&) = delete;

    /// Adds hashes in order, given as alternating high and low words; `is_new[k]` tells whether
    /// hash k was neither in the set nor among those before it. Throws std::bad_alloc if memory
    /// runs out; the set then holds the hashes before the one that did not fit.
    void insert(std::span<const std::uint64_t> words, std::span<bool> is_new);

    std::size_t size() const;
    std::size_t memory_bytes() const;

  private:
    class Shard {
      public:
        bool insert(Hash hash);
        void prefetch(Hash hash) const noexcept;
        std::size_t size() const noexcept { return size_; }
        std::size_t memory_bytes() const noexcept { return slots_.size() * sizeof(Hash); }

      private:
        void grow();

        std::vector<Hash> slots_;  // A hash of zero is a free slot.
        std::size_t size_ = 0;
    };

    Shard& shard_of(Hash hash) noexcept { return shards_[hash.high >> shard_shift]; }

    static constexpr std::size_t num_shards = 256;
    static constexpr int shard_shift = 56;

    std::array<Shard, num_shards> shards_;
    bool has_zero_ = false;
    mutable std::mutex mutex_;
};

}  // namespace megatron_bert
