// Which documents of a corpus are held out of training.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "random.h"

namespace megatron_bert {

/// Divides documents into a training part and a held-out part, by a hash of their number that does
/// not depend on any seed: a document stays on its side in every run.
class HeldOutSplit {
  public:
    /// All documents are on one side.
    HeldOutSplit() = default;

    /// The held-out side has about `fraction` of the documents, the other side the rest.
    /// Throws std::invalid_argument unless 0 <= fraction < 1.
    HeldOutSplit(double fraction, bool held_out) : held_out_(held_out) {
        if (!(fraction >= 0 && fraction < 1)) {
            throw std::invalid_argument("the held-out fraction must be in [0, 1), got " +
                                        std::to_string(fraction));
        }
        held_out_below_ = static_cast<std::uint64_t>(fraction * 18446744073709551616.0);
    }

    bool is_whole() const noexcept { return held_out_below_ == 0 && !held_out_; }
    bool is_held_out() const noexcept { return held_out_; }

    /// Whether a document is on this side.
    bool has(std::int64_t document) const noexcept {
        return is_whole() ||
               (mix(static_cast<std::uint64_t>(document) + golden_step) < held_out_below_) ==
                   held_out_;
    }

  private:
    std::uint64_t held_out_below_ = 0;
    bool held_out_ = false;
};

}  // namespace megatron_bert
