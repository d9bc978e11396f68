#include "stored_file.h"

#include <cerrno>
#include <filesystem>
#include <new>
#include <stdexcept>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace megatron_bert {

StoredFile::StoredFile(std::string path, FileAccess access)
    : path_(std::move(path)), absolute_path_(std::filesystem::absolute(path_)) {
    const int descriptor = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) {
        fail(errno, "");
    }
    struct ::stat status {};
    if (::fstat(descriptor, &status) != 0) {
        const int error = errno;
        ::close(descriptor);
        fail(error, "");
    }
    state_ = state_of(status);
    if (access == FileAccess::map && state_.size > 0) {
        void* address = ::mmap(nullptr, size(), PROT_READ, MAP_SHARED, descriptor, 0);
        if (address != MAP_FAILED) {
            mapped_ = static_cast<const std::byte*>(address);
        }
    }
    if (is_mapped()) {
        ::close(descriptor);
    } else {
        descriptor_ = descriptor;
    }
}

StoredFile::~StoredFile() {
    if (mapped_ != nullptr) {
        ::munmap(const_cast<std::byte*>(mapped_), size());
    }
    if (descriptor_ >= 0) {
        ::close(descriptor_);
    }
}

void StoredFile::read(std::size_t offset, std::span<std::byte> bytes) const {
    while (!bytes.empty()) {
        const ::ssize_t count =
            ::pread(descriptor_, bytes.data(), bytes.size(), static_cast<::off_t>(offset));
        if (count < 0) {
            if (errno == EINTR) {
                continue;
            }
            fail(errno, ": cannot read " + std::to_string(bytes.size()) + " bytes at offset " +
                            std::to_string(offset));
        }
        if (count == 0) {
            throw std::runtime_error(path_ + ": ends at byte " + std::to_string(offset) + " of " +
                                     std::to_string(size()) + ": it was truncated while in use");
        }
        bytes = bytes.subspan(static_cast<std::size_t>(count));
        offset += static_cast<std::size_t>(count);
    }
}

std::span<const std::byte> StoredFile::whole() {
    if (is_mapped()) {
        return {mapped_, size()};
    }
    if (copy_ == nullptr) {
        try {
            copy_ = std::make_unique_for_overwrite<std::byte[]>(size());
        } catch (const std::bad_alloc&) {
            throw std::runtime_error(path_ + ": the system refuses to map it, and its " +
                                     std::to_string(size()) + " bytes do not fit into memory");
        }
        read(0, {copy_.get(), size()});
    }
    return {copy_.get(), size()};
}

void StoredFile::expect_random_reads() const noexcept {
    if (mapped_ != nullptr) {
        // Advice only: a system that ignores it still reads correctly.
        static_cast<void>(::madvise(const_cast<std::byte*>(mapped_), size(), MADV_RANDOM));
    }
}

void StoredFile::check_unchanged() const {
    struct ::stat status {};
    if (::stat(absolute_path_.c_str(), &status) != 0) {
        fail(errno, ": was removed, or can no longer be reached, while in use");
    }
    const State now = state_of(status);
    if (now == state_) {
        return;
    }
    const std::string sizes =
        " from " + std::to_string(state_.size) + " to " + std::to_string(now.size) + " bytes";
    if (now.device != state_.device || now.inode != state_.inode) {
        throw std::runtime_error(path_ + ": was replaced by another file while in use (" +
                                 sizes.substr(1) +
                                 "); what is open is still the old one, but a resumed run would "
                                 "read the new one");
    }
    if (now.size != state_.size) {
        throw std::runtime_error(path_ + ": " +
                                 (now.size < state_.size ? "was truncated" : "grew") + sizes +
                                 " while in use");
    }
    throw std::runtime_error(path_ + ": was modified while in use (its modification time changed)");
}

StoredFile::State StoredFile::state_of(const struct ::stat& status) noexcept {
    return {status.st_dev, status.st_ino, status.st_size, status.st_mtim.tv_sec,
            status.st_mtim.tv_nsec};
}

void StoredFile::fail(int error, const std::string& what) const {
    throw std::system_error(error, std::generic_category(), path_ + what);
}

}  // namespace megatron_bert
