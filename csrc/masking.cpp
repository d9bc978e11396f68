#include "masking.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "wide_vectors.h"

namespace megatron_bert {

namespace {

constexpr double two_to_32 = 4294967296.0;

/// Least common multiple of 1..max_unit_tokens: makes the shares 1/k whole numbers.
constexpr std::int32_t ngram_shares = 840;

void require(bool holds, const std::string& message) {
    if (!holds) {
        throw std::invalid_argument(message);
    }
}

bool is_ratio(double value) { return value >= 0 && value <= 1; }

void check_options(const MaskingOptions& options) {
    require(is_ratio(options.mask_ratio) && is_ratio(options.random_ratio) &&
                options.mask_ratio + options.random_ratio <= 1 + 1e-9,
            "mask_ratio and random_ratio must be in [0, 1], as their sum, got " +
                std::to_string(options.mask_ratio) + " and " +
                std::to_string(options.random_ratio));
    require(options.max_ngram >= 1 && options.max_ngram <= max_unit_tokens,
            "max_ngram must be between 1 and 8, got " + std::to_string(options.max_ngram));
}

void check_tables(const WordTables& words, std::size_t vocabulary_size) {
    require(words.first_class.size() == vocabulary_size &&
                words.last_class.size() == vocabulary_size &&
                words.starts_word.size() == vocabulary_size,
            "masking whole words needs word tables with an entry for each of the " +
                std::to_string(vocabulary_size) + " ids");
}

/// Swaps a random candidate, among those from `next` on, into place `next`, and returns it.
template <typename T>
T draw(std::vector<T>& candidates, std::size_t next, CounterRandom& random) noexcept {
    const std::uint64_t place = next + random.below(candidates.size() - next);
    std::swap(candidates[next], candidates[static_cast<std::size_t>(place)]);
    return candidates[next];
}

MEGATRON_BERT_WIDE_VECTORS
std::int32_t smallest(std::span<const std::int32_t> tokens) noexcept {
    std::int32_t found = std::numeric_limits<std::int32_t>::max();
    for (const std::int32_t token : tokens) {
        found = std::min(found, token);
    }
    return found;
}

void choose(Masker::Scratch& scratch, std::size_t position) noexcept {
    scratch.chosen[position / 64] |= std::uint64_t{1} << (position % 64);
}

/// How many of a row's maskable tokens to mask.
std::int64_t wanted(double probability, std::int64_t maskable, std::size_t num_slots) noexcept {
    const double share = std::floor(probability * static_cast<double>(maskable) + 0.5);
    const std::int64_t limit = std::min(maskable, static_cast<std::int64_t>(num_slots));
    return std::min(limit, std::max<std::int64_t>(1, static_cast<std::int64_t>(share)));
}

}  // namespace

void check_probability(double probability) {
    require(probability > 0 && probability <= 1,
            "the masking probability must be in (0, 1], got " + std::to_string(probability));
}

void clear_slots(const MaskedSlots& slots, std::size_t used) noexcept {
    std::fill(slots.positions + used, slots.positions + slots.size, 0);
    std::fill(slots.labels + used, slots.labels + slots.size, 0);
    std::fill(slots.weights + used, slots.weights + slots.size, 0.0F);
}

Masker::Masker(Vocabulary vocabulary, MaskingOptions options, const WordTables& words)
    : vocabulary_(std::move(vocabulary)), options_(options) {
    check_options(options_);
    require(vocabulary_.size > 0, "the vocabulary is empty");
    const auto size = static_cast<std::size_t>(vocabulary_.size);
    if (options_.unit == MaskUnit::whole_word) {
        check_tables(words, size);
    }
    is_special_.assign(size, false);
    std::vector<std::int32_t> special_ids = vocabulary_.special_ids;
    special_ids.insert(special_ids.end(), {vocabulary_.cls, vocabulary_.sep, vocabulary_.mask,
                                           vocabulary_.pad});
    for (const std::int32_t id : special_ids) {
        require(id >= 0 && id < vocabulary_.size,
                "special id " + std::to_string(id) + " is not in the vocabulary of " +
                    std::to_string(vocabulary_.size));
        is_special_[static_cast<std::size_t>(id)] = true;
        largest_special_ = std::max(largest_special_, id);
    }
    for (std::int32_t id = 0; id < vocabulary_.size; ++id) {
        if (!is_special(id)) {
            ordinary_ids_.push_back(id);
        }
    }
    require(!ordinary_ids_.empty(), "every id of the vocabulary is special");
    ngram_shares_end_.fill(std::numeric_limits<std::int32_t>::max());
    std::int32_t shares = 0;
    for (std::int32_t length = 1; length <= options_.max_ngram; ++length) {
        shares += ngram_shares / length;
        ngram_shares_end_[static_cast<std::size_t>(length) - 1] = shares;
    }
    num_ngram_shares_ = static_cast<std::uint64_t>(shares);
    for (std::size_t id = 0; id < words.first_class.size(); ++id) {
        word_ends_.push_back({words.first_class[id], words.last_class[id], words.starts_word[id]});
    }
    mask_below_ = static_cast<std::uint64_t>(options_.mask_ratio * two_to_32);
    random_below_ = mask_below_ + static_cast<std::uint64_t>(options_.random_ratio * two_to_32);
}

void Masker::mask(std::span<std::int32_t> tokens, std::span<const Text> texts, double probability,
                  std::uint64_t key, const MaskedSlots& slots, Scratch& scratch) const {
    CounterRandom random(key);
    scratch.chosen.assign((tokens.size() + 63) / 64, 0);
    list_maskable(tokens, texts, scratch);
    const std::int64_t target =
        wanted(probability, static_cast<std::int64_t>(scratch.maskable.size()), slots.size);
    switch (options_.unit) {
        case MaskUnit::token:
            choose_tokens(target, random, scratch);
            break;
        case MaskUnit::whole_word:
            list_words(tokens, scratch);
            choose_units(target, slots.size, random, scratch);
            break;
        case MaskUnit::ngram:
            list_ngrams(random, scratch);
            choose_units(target, slots.size, random, scratch);
            break;
    }
    std::size_t slot = 0;
    for (std::size_t word = 0; word < scratch.chosen.size(); ++word) {
        for (std::uint64_t bits = scratch.chosen[word]; bits != 0; bits &= bits - 1) {
            const std::size_t position = word * 64 + static_cast<std::size_t>(std::countr_zero(bits));
            slots.positions[slot] = static_cast<std::int32_t>(position);
            slots.labels[slot] = tokens[position];
            slots.weights[slot] = 1.0F;
            tokens[position] = replacement(tokens[position], random);
            ++slot;
        }
    }
    clear_slots(slots, slot);
}

std::int32_t Masker::replacement(std::int32_t token, CounterRandom& random) const noexcept {
    const std::uint64_t draw = random.next() >> 32;
    if (draw < mask_below_) {
        return vocabulary_.mask;
    }
    if (draw < random_below_) {
        return ordinary_ids_[static_cast<std::size_t>(random.below(ordinary_ids_.size()))];
    }
    return token;
}

void Masker::list_maskable(std::span<const std::int32_t> tokens, std::span<const Text> texts,
                           Scratch& scratch) const {
    scratch.maskable.resize(tokens.size());
    scratch.runs.clear();
    std::int32_t* next = scratch.maskable.data();
    for (const Text& text : texts) {
        const auto words = tokens.subspan(text.begin, text.length);
        if (smallest(words) > largest_special_) {
            // Nearly always the case: special ids are the lowest ones, and text has none.
            std::iota(next, next + words.size(), static_cast<std::int32_t>(text.begin));
            next += words.size();
            scratch.runs.push_back(text);
            continue;
        }
        for (std::size_t i = 0; i < words.size(); ++i) {
            if (is_special(words[i])) {
                continue;
            }
            if (i == 0 || is_special(words[i - 1])) {
                scratch.runs.push_back(text.from(i));
                scratch.runs.back().length = 0;
            }
            ++scratch.runs.back().length;
            *next++ = static_cast<std::int32_t>(text.begin + i);
        }
    }
    scratch.maskable.resize(static_cast<std::size_t>(next - scratch.maskable.data()));
}

void Masker::list_words(std::span<const std::int32_t> tokens, Scratch& scratch) const {
    scratch.units.clear();
    for (const Text& run : scratch.runs) {
        WordEnds before;
        for (std::size_t i = 0; i < run.length; ++i) {
            const std::size_t place = run.begin + i;
            const WordEnds ends = word_ends_[static_cast<std::size_t>(tokens[place])];
            const bool starts = run.word_starts != nullptr
                                    ? run.word_starts[i] != 0
                                    : ends.starts_word != 0 || before.last != ends.first;
            if (i == 0 || starts || scratch.units.back().length == max_unit_tokens) {
                scratch.units.push_back({static_cast<std::int32_t>(place), 1});
            } else {
                ++scratch.units.back().length;
            }
            before = ends;
        }
    }
}

void Masker::list_ngrams(CounterRandom& random, Scratch& scratch) const {
    scratch.units.clear();
    for (const Text& run : scratch.runs) {
        auto begin = static_cast<std::int32_t>(run.begin);
        const std::int32_t end = begin + static_cast<std::int32_t>(run.length);
        while (begin < end) {
            const std::int32_t length = std::min(draw_ngram_length(random), end - begin);
            scratch.units.push_back({begin, length});
            begin += length;
        }
    }
}

std::int32_t Masker::draw_ngram_length(CounterRandom& random) const noexcept {
    const auto drawn = static_cast<std::int32_t>(random.below(num_ngram_shares_));
    // Branch-free, because lengths are hard to predict.
    std::int32_t length = 1;
    for (const std::int32_t end : ngram_shares_end_) {
        length += drawn >= end ? 1 : 0;
    }
    return length;
}

void Masker::choose_tokens(std::int64_t target, CounterRandom& random, Scratch& scratch) const {
    for (std::size_t drawn = 0; drawn < static_cast<std::size_t>(target); ++drawn) {
        choose(scratch, static_cast<std::size_t>(draw(scratch.maskable, drawn, random)));
    }
}

void Masker::choose_units(std::int64_t target, std::size_t num_slots, CounterRandom& random,
                          Scratch& scratch) const {
    if (target == 0) {
        return;
    }
    std::int64_t num_chosen = 0;
    const auto choose_unit = [&](const Scratch::Unit& unit) {
        const auto room = static_cast<std::int64_t>(num_slots) - num_chosen;
        const std::int64_t length = std::min<std::int64_t>(unit.length, room);
        for (std::int64_t i = 0; i < length; ++i) {
            choose(scratch, static_cast<std::size_t>(unit.begin + i));
        }
        num_chosen += length;
    };
    std::vector<Scratch::Unit>& units = scratch.units;
    const std::int32_t start =
        scratch.maskable[static_cast<std::size_t>(random.below(scratch.maskable.size()))];
    const auto after_first = std::ranges::upper_bound(units, start, {}, &Scratch::Unit::begin);
    std::swap(units.front(), *(after_first - 1));
    const Scratch::Unit first = units.front();
    std::int64_t covered = first.begin + first.length - start;
    if (first.begin == start) {
        choose_unit(first);
    }
    for (std::size_t drawn = 1; covered < target && drawn < units.size(); ++drawn) {
        const Scratch::Unit unit = draw(units, drawn, random);
        choose_unit(unit);
        covered += unit.length;
    }
    // Only if all other units are covered does the arc come around to where the first one begins.
    if (first.begin != start && covered < target) {
        choose_unit(first);
    }
}

}  // namespace megatron_bert
