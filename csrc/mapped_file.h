// A read-only memory map of a whole file.
#pragma once

#include <cerrno>
#include <cstddef>
#include <string>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace megatron_bert {

/// Maps a file for reading for as long as the object lives.
class MappedFile {
  public:
    /// Throws std::system_error (naming the path) when the file cannot be opened or mapped.
    explicit MappedFile(const std::string& path) {
        const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (descriptor < 0) {
            throw std::system_error(errno, std::generic_category(), path);
        }
        struct stat status {};
        if (::fstat(descriptor, &status) != 0) {
            const int error = errno;
            ::close(descriptor);
            throw std::system_error(error, std::generic_category(), path);
        }
        size_ = static_cast<std::size_t>(status.st_size);
        // An empty file cannot be mapped; it is an empty range.
        if (size_ > 0) {
            void* address = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor, 0);
            if (address == MAP_FAILED) {
                const int error = errno;
                ::close(descriptor);
                throw std::system_error(error, std::generic_category(), path);
            }
            data_ = static_cast<const std::byte*>(address);
        }
        ::close(descriptor);
    }

    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    MappedFile(MappedFile&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

    MappedFile& operator=(MappedFile&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }

    ~MappedFile() {
        if (data_ != nullptr) {
            ::munmap(const_cast<std::byte*>(data_), size_);
        }
    }

    const std::byte* data() const noexcept { return data_; }
    std::size_t size() const noexcept { return size_; }

  private:
    const std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace megatron_bert
