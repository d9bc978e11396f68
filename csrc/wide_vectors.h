// Lets one build for all machines loop over tokens in the widest vectors that each machine has.
#pragma once

#if __has_include(<features.h>)
#include <features.h>  // defines __GLIBC__
#endif

// Sanitizers start only after the choice between clones is made, and do not survive it.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MEGATRON_BERT_SANITIZED
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define MEGATRON_BERT_SANITIZED
#endif
#endif

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(MEGATRON_BERT_SANITIZED)
#define MEGATRON_BERT_WIDE_VECTORS __attribute__((target_clones("avx2", "default")))
#else
#define MEGATRON_BERT_WIDE_VECTORS
#endif
