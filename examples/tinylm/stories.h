/*
 * Stories with questions about their own facts: the text of tinylm's training and evaluation.
 *
 * A story states facts ("The hat of Lily is red.") and later has questions about them in a fixed
 * form ("Question: What is the hat of Lily? Answer: The hat of Lily is red."). There is at most one
 * question for a fact, so the distance from the statement to the answer is the distance over which
 * the model must attend. Several people have a fact of each kind, so the answer cannot be guessed
 * from the kind. In between is narrative: scenes with two people, a place and a thing.
 *
 * The same seed and length give the same bytes on every machine.
 */
#ifndef TINYLM_STORIES_H
#define TINYLM_STORIES_H

#include <stddef.h>
#include <stdint.h>

/* One question. All are byte offsets into the story. */
typedef struct story_question {
    uint32_t fact;         /* the sentence that states the fact */
    uint32_t value;        /* the answer's word inside that sentence */
    uint32_t answer_begin; /* the answer's word, its leading space included */
    uint32_t answer_end;
} story_question;

typedef struct story {
    char *text; /* NUL-terminated */
    size_t n_bytes;
    story_question *questions;
    size_t n_questions;
} story;

enum { STORY_MIN_WORDS = 48, STORY_MAX_WORDS = 65536 };

/*
 * Make the story of `seed` with at most n_words words and marks, clamped to the limits above.
 * A word or a mark is one token of tinylm's own tokenizer nearly always, so n_words is
 * the length in tokens to within a few per cent.
 *
 * 0 on success, -1 when memory is short. The story is freed with story_free.
 */
int story_make(story *out, uint64_t seed, size_t n_words);
void story_free(story *s);

#endif
