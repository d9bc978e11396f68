#include "unigram_encoder.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace megatron_bert {

namespace {

// SentencePiece's constants.
constexpr float unknown_penalty = 10.0F;
constexpr float reset_beyond = 100'000.0F;

constexpr std::uint32_t length_bits = 8;
constexpr std::uint32_t max_length = (1U << length_bits) - 1;
constexpr std::uint32_t no_piece = (1U << (32 - length_bits)) - 1;
constexpr std::uint32_t no_node = std::numeric_limits<std::uint32_t>::max();

bool is_half_surrogate(char32_t character) { return character >= 0xD800 && character < 0xE000; }

std::size_t common_prefix(std::u32string_view a, std::u32string_view b) {
    const auto [end, _] = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
    return static_cast<std::size_t>(end - a.begin());
}

void check(const UnigramEncoder::Piece& piece) {
    if (piece.text.empty() || piece.text.size() > max_length || !std::isfinite(piece.score) ||
        piece.id < 0 || static_cast<std::uint32_t>(piece.id) >= no_piece) {
        throw std::invalid_argument("piece " + std::to_string(piece.id) + " of " +
                                    std::to_string(piece.text.size()) + " characters and score " +
                                    std::to_string(piece.score) + " cannot be used");
    }
}

}  // namespace

UnigramEncoder::UnigramEncoder(std::vector<Piece> pieces,
                               const std::array<std::int32_t, 256>& byte_ids, bool space_in_front)
    : byte_ids_(byte_ids), space_in_front_(space_in_front) {
    if (pieces.empty()) {
        throw std::invalid_argument("there is no piece");
    }
    float lowest_score = std::numeric_limits<float>::max();
    for (const Piece& piece : pieces) {
        check(piece);
        lowest_score = std::min(lowest_score, piece.score);
        root_ = std::max(root_, static_cast<std::uint32_t>(piece.id) + 1);
    }
    unknown_score_ = lowest_score - unknown_penalty;
    std::ranges::sort(pieces, {}, &Piece::text);
    build(pieces);
}

void UnigramEncoder::build(std::span<const Piece> sorted) {
    std::size_t num_nodes = 0;
    std::u32string_view previous;
    for (const Piece& piece : sorted) {
        num_nodes += piece.text.size() - common_prefix(previous, piece.text);
        previous = piece.text;
    }
    table_.assign(num_table_characters, {no_node, unknown_score_});
    edges_.assign(std::bit_ceil(2 * num_nodes), {no_node, 0, {no_node, 0.0F}});
    slot_mask_ = edges_.size() - 1;
    std::uint32_t next_number = root_ + 1;
    std::vector<Node*> path;
    previous = {};
    for (const Piece& piece : sorted) {
        std::size_t depth = common_prefix(previous, piece.text);
        if (depth == piece.text.size()) {
            throw std::invalid_argument("piece " + std::to_string(piece.id) + " stands twice");
        }
        path.resize(depth);
        for (; depth < piece.text.size(); ++depth) {
            std::uint32_t parent = root_;
            if (depth > 0) {
                path.back()->number &= ~leaf;
                parent = path.back()->number;
            }
            // A piece sorts after its own prefixes, so those that are pieces have their ids by now.
            const bool ends = depth + 1 == piece.text.size();
            const Node node = ends ? Node{static_cast<std::uint32_t>(piece.id), piece.score}
                                   : Node{next_number++, unknown_score_};
            path.push_back(&insert(parent, piece.text[depth], {node.number | leaf, node.score}));
        }
        previous = piece.text;
    }
}

UnigramEncoder::Node& UnigramEncoder::insert(std::uint32_t parent, char32_t character,
                                             Node child) {
    if (parent == root_ && character < num_table_characters) {
        return table_[character] = child;
    }
    std::size_t slot = slot_of(parent, character);
    while (edges_[slot].parent != no_node) {
        slot = (slot + 1) & slot_mask_;
    }
    edges_[slot] = {parent, character, child};
    return edges_[slot].child;
}

std::size_t UnigramEncoder::slot_of(std::uint32_t parent, char32_t character) const noexcept {
    const std::uint64_t key = std::uint64_t{parent} << 21 ^ character;
    return static_cast<std::size_t>(key * 0x9E37'79B9'7F4A'7C15U >> 32) & slot_mask_;
}

const UnigramEncoder::Node* UnigramEncoder::child_of(std::uint32_t parent,
                                                     char32_t character) const noexcept {
    std::size_t slot = slot_of(parent, character);
    while (edges_[slot].parent != no_node) {
        if (edges_[slot].parent == parent && edges_[slot].character == character) {
            return &edges_[slot].child;
        }
        slot = (slot + 1) & slot_mask_;
    }
    return nullptr;
}

UnigramEncoder::Node UnigramEncoder::first_node(char32_t character) const noexcept {
    if (character < num_table_characters) {
        return table_[character];
    }
    const Node* node = child_of(root_, character);
    return node == nullptr ? Node{no_node, unknown_score_} : *node;
}

void UnigramEncoder::fetch_ahead(char32_t first, char32_t second) const noexcept {
    const std::uint32_t parent = first_node(first).number & ~leaf;
    __builtin_prefetch(&edges_[slot_of(parent, second)]);
}

void UnigramEncoder::segment(Workspace& workspace) const {
    workspace.best_.assign(workspace.characters_.size() + 1,
                           {-std::numeric_limits<float>::infinity(), 0});
    const std::span<const char32_t> text = workspace.characters_;
    const std::span<Workspace::Step> best = workspace.best_;
    const std::uint32_t root = root_;
    best[0].score = 0.0F;
    std::size_t reached = 0;
    for (std::size_t begin = 0; begin < text.size(); ++begin) {
        if (begin + 3 < text.size()) {
            fetch_ahead(text[begin + 2], text[begin + 3]);
        }
        float score = best[begin].score;
        if (std::fabs(score) > reset_beyond) {
            for (std::size_t end = begin; end <= reached; ++end) {
                best[end].score -= score;
            }
            score = 0.0F;
        }
        std::size_t end = begin;
        const auto propose = [&](float piece_score, std::uint32_t piece) {
            const float candidate = score + piece_score;
            if (candidate > best[end].score) {
                best[end] = {candidate,
                             piece << length_bits | static_cast<std::uint32_t>(end - begin)};
            }
        };
        Node node = first_node(text[begin]);
        ++end;
        // A first character that is not itself a piece has the score of an unknown one.
        propose(node.score, (node.number & ~leaf) < root ? node.number & ~leaf : no_piece);
        while ((node.number & leaf) == 0 && end < text.size()) {
            const Node* next = child_of(node.number, text[end]);
            if (next == nullptr) {
                break;
            }
            node = *next;
            ++end;
            if ((node.number & ~leaf) < root) {
                propose(node.score, node.number & ~leaf);
            }
        }
        reached = std::max(reached, end);
    }
}

void UnigramEncoder::append_ids(const Workspace& workspace, std::vector<std::int32_t>& ids) const {
    const std::size_t before = ids.size();
    for (std::size_t end = workspace.characters_.size(); end > 0;) {
        const std::uint32_t step = workspace.best_[end].piece_and_length;
        if (step >> length_bits != no_piece) {
            ids.push_back(static_cast<std::int32_t>(step >> length_bits));
            end -= step & max_length;
            continue;
        }
        char32_t character = workspace.characters_[--end];
        if (is_half_surrogate(character)) {
            ids.resize(before);
            throw std::invalid_argument("text holds half a surrogate pair");
        }
        const std::size_t following =
            character < 0x80 ? 0 : character < 0x800 ? 1 : character < 0x10000 ? 2 : 3;
        for (std::size_t byte = 0; byte < following; ++byte) {
            ids.push_back(byte_ids_[0x80 | (character & 0x3F)]);
            character >>= 6;
        }
        constexpr std::array<char32_t, 4> first_byte{0x00, 0xC0, 0xE0, 0xF0};
        ids.push_back(byte_ids_[first_byte[following] | character]);
    }
    std::reverse(ids.begin() + static_cast<std::ptrdiff_t>(before), ids.end());
}

}  // namespace megatron_bert
