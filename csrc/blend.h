// Which corpus each row of a stage comes from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace megatron_bert {

/// Divides a stage's rows among corpora by weight, evenly spread: after every row each corpus is
/// within a few rows of its share.
///
/// Each row goes to the corpus with the largest deficit, which is its share of the rows up to and
/// including this one, minus the rows it has; ties go to the corpus listed first. Shares are
/// integers (the whole is 2^32), so that every machine decides alike.
class Blend {
  public:
    /// Throws std::invalid_argument unless the weights are finite and positive and rows >= 0.
    Blend(std::span<const double> weights, std::int64_t rows);

    struct Choice {
        std::size_t corpus = 0;
        std::int64_t row = 0;  ///< how many rows of the stage the corpus has before this one
    };

    /// The choice for a row in [0, rows).
    Choice operator()(std::int64_t row) const;

    /// Rows that each corpus has in the whole stage.
    const std::vector<std::int64_t>& totals() const noexcept { return totals_; }

  private:
    std::vector<std::int64_t> shares_;
    std::vector<std::int64_t> totals_;
    /// The corpora's counts before every `block_rows`-th row.
    std::vector<std::int64_t> counts_;
    /// Rows dealt in a block before each of its strides; a choice is found by dealing from there.
    std::vector<std::uint8_t> dealt_in_block_;
};

}  // namespace megatron_bert
