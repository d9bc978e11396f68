#include "blend.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

namespace megatron_bert {

namespace {

constexpr std::int64_t block_rows = 256;
constexpr std::int64_t whole = std::int64_t{1} << 32;

std::vector<std::int64_t> shares_of(std::span<const double> weights) {
    for (const double weight : weights) {
        if (!std::isfinite(weight) || weight <= 0) {
            throw std::invalid_argument("a corpus' weight must be a positive number, got " +
                                        std::to_string(weight));
        }
    }
    // Scaled by the largest first, so that no sum of finite weights overflows.
    const double largest = *std::ranges::max_element(weights);
    double sum = 0;
    for (const double weight : weights) {
        sum += weight / largest;
    }
    std::vector<std::int64_t> shares;
    for (const double weight : weights) {
        const double share = weight / largest / sum * static_cast<double>(whole);
        shares.push_back(std::max<std::int64_t>(1, static_cast<std::int64_t>(share)));
    }
    // What rounding left over goes to the largest, where it matters least.
    const std::int64_t given = std::accumulate(shares.begin(), shares.end(), std::int64_t{0});
    *std::ranges::max_element(shares) += whole - given;
    return shares;
}

/// Deals rows one at a time.
class Dealer {
  public:
    Dealer(const std::vector<std::int64_t>& shares, std::int64_t row, const std::int64_t* counts)
        : shares_(shares), counts_(counts, counts + shares.size()), deficits_(shares.size()) {
        for (std::size_t corpus = 0; corpus < shares.size(); ++corpus) {
            // Both products may wrap around; their difference is small and exact.
            deficits_[corpus] = static_cast<std::int64_t>(
                static_cast<std::uint64_t>(shares[corpus]) * static_cast<std::uint64_t>(row) -
                static_cast<std::uint64_t>(counts_[corpus]) * static_cast<std::uint64_t>(whole));
        }
    }

    /// Gives the next row to a corpus and returns it.
    std::size_t deal() noexcept {
        std::size_t chosen = 0;
        for (std::size_t corpus = 0; corpus < shares_.size(); ++corpus) {
            deficits_[corpus] += shares_[corpus];
            if (deficits_[corpus] > deficits_[chosen]) {
                chosen = corpus;
            }
        }
        deficits_[chosen] -= whole;
        ++counts_[chosen];
        return chosen;
    }

    const std::vector<std::int64_t>& counts() const noexcept { return counts_; }

  private:
    const std::vector<std::int64_t>& shares_;
    std::vector<std::int64_t> counts_;
    std::vector<std::int64_t> deficits_;
};

}  // namespace

Blend::Blend(std::span<const double> weights, std::int64_t rows) {
    if (weights.empty() || rows < 0) {
        throw std::invalid_argument("a blend needs at least one corpus and no negative rows, got " +
                                    std::to_string(weights.size()) + " and " +
                                    std::to_string(rows));
    }
    shares_ = shares_of(weights);
    totals_.assign(weights.size(), 0);
    if (weights.size() == 1) {
        totals_[0] = rows;
        return;
    }
    Dealer dealer(shares_, 0, totals_.data());
    const std::int64_t num_blocks = (rows + block_rows - 1) / block_rows;
    counts_.reserve(static_cast<std::size_t>(num_blocks) * weights.size());
    for (std::int64_t row = 0; row < rows; ++row) {
        if (row % block_rows == 0) {
            counts_.insert(counts_.end(), dealer.counts().begin(), dealer.counts().end());
        }
        dealer.deal();
    }
    totals_ = dealer.counts();
}

Blend::Choice Blend::operator()(std::int64_t row) const noexcept {
    if (shares_.size() == 1) {
        return {0, row};
    }
    const std::int64_t block = row / block_rows;
    Dealer dealer(shares_, block * block_rows,
                  counts_.data() + static_cast<std::size_t>(block) * shares_.size());
    for (std::int64_t skipped = block * block_rows; skipped < row; ++skipped) {
        dealer.deal();
    }
    const std::size_t corpus = dealer.deal();
    return {corpus, dealer.counts()[corpus] - 1};
}

}  // namespace megatron_bert
