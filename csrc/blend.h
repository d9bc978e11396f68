// Which corpus each row of a stage comes from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace megatron_bert {

/// Shares a stage's rows among corpora by weight, evenly spread: after every row each corpus has
/// within a few rows of its share.
///
/// Each row goes to the corpus with the largest deficit, that is its share of the rows up to and
/// with this one less the rows it has; ties go to the corpus named first. Shares are integers
/// (2^32 for the whole), so that every machine decides alike.
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
    /// What is dealt in a block before each of its strides; a choice is dealt again from there.
    std::vector<std::uint8_t> dealt_in_block_;
};

}  // namespace megatron_bert
