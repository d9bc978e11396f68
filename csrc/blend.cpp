#include "blend.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

namespace megatron_bert {

namespace {

constexpr std::int64_t block_rows = 256;
constexpr std::int64_t stride_rows = 32;
static_assert(block_rows % stride_rows == 0 && block_rows - stride_rows <= 255);
constexpr std::int64_t whole = std::int64_t{1} << 32;

std::vector<std::int64_t> shares_of(std::span<const double> weights) {
    for (const double weight : weights) {
        if (!std::isfinite(weight) || weight <= 0) {
            throw std::invalid_argument("a corpus' weight must be a positive number, got " +
                                        std::to_string(weight));
        }
    }
    // Scaled by the largest weight first, so that no sum of finite weights overflows.
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
    // The remainder of rounding goes to the largest share, where it matters least.
    const std::int64_t given = std::accumulate(shares.begin(), shares.end(), std::int64_t{0});
    *std::ranges::max_element(shares) += whole - given;
    return shares;
}

/// Deals rows one at a time.
class Dealer {
  public:
    /// `counts` says how many of the first `row` rows each corpus got.
    Dealer(const std::vector<std::int64_t>& shares, std::int64_t row,
           const std::vector<std::int64_t>& counts)
        : shares_(shares), deficits_(counts) {
        for (std::size_t corpus = 0; corpus < shares.size(); ++corpus) {
            // Both products may wrap around; their difference is small and exact.
            deficits_[corpus] = static_cast<std::int64_t>(
                static_cast<std::uint64_t>(shares[corpus]) * static_cast<std::uint64_t>(row) -
                static_cast<std::uint64_t>(counts[corpus]) * static_cast<std::uint64_t>(whole));
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
        return chosen;
    }

  private:
    const std::vector<std::int64_t>& shares_;
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
    const auto num_units = [&](std::int64_t unit_rows) {
        return static_cast<std::size_t>((rows + unit_rows - 1) / unit_rows) * weights.size();
    };
    counts_.reserve(num_units(block_rows));
    dealt_in_block_.reserve(num_units(stride_rows));
    Dealer dealer(shares_, 0, totals_);
    for (std::int64_t row = 0; row < rows; ++row) {
        if (row % block_rows == 0) {
            counts_.insert(counts_.end(), totals_.begin(), totals_.end());
        }
        if (row % stride_rows == 0) {
            const std::int64_t* before = counts_.data() + counts_.size() - weights.size();
            for (std::size_t corpus = 0; corpus < weights.size(); ++corpus) {
                dealt_in_block_.push_back(
                    static_cast<std::uint8_t>(totals_[corpus] - before[corpus]));
            }
        }
        ++totals_[dealer.deal()];
    }
}

Blend::Choice Blend::operator()(std::int64_t row) const {
    const std::size_t num_corpora = shares_.size();
    if (num_corpora == 1) {
        return {0, row};
    }
    const auto block = static_cast<std::size_t>(row / block_rows) * num_corpora;
    const auto stride = static_cast<std::size_t>(row / stride_rows) * num_corpora;
    std::vector<std::int64_t> counts(num_corpora);
    for (std::size_t corpus = 0; corpus < num_corpora; ++corpus) {
        counts[corpus] = counts_[block + corpus] + dealt_in_block_[stride + corpus];
    }
    std::int64_t next = row / stride_rows * stride_rows;
    Dealer dealer(shares_, next, counts);
    for (; next < row; ++next) {
        ++counts[dealer.deal()];
    }
    const std::size_t corpus = dealer.deal();
    return {corpus, counts[corpus]};
}

}  // namespace megatron_bert
