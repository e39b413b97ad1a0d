/*
 * The story generator: see stories.h for what a story is.
 *
 * A story is planned, then written. The plan is a list of events on a clock that counts words:
 * each fact has a time of its statement and a later one of its question. The writer fills the time
 * up to the next event with narrative and then writes the event. Half of the facts are stated in
 * the first eighth and a third of the questions follow their fact soon, so all distances up to the
 * length of the story are frequent.
 */
#include "stories.h"

#include <ctype.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

/* ---- words ---- */

/* Short words: each costs the tokenizer few merges, so that all of them become one token. */
static const char *const names_she[] = {"Anna", "Lily", "Mia", "Eva", "Zoe", "Ida", "Kim",
                                        "Sue",  "Una",  "Bea", "Dot", "Fay", "Ivy", "Jan",
                                        "Liz",  "Meg",  "Nan", "Peg", "Amy", "Rose"};
static const char *const names_he[] = {"Tom", "Ben", "Sam", "Max", "Leo", "Jon", "Ned",
                                       "Rex", "Tim", "Vic", "Wes", "Abe", "Cal", "Eli",
                                       "Gus", "Hal", "Kit", "Ray", "Sid", "Bob"};
enum { N_NAMES = COUNT(names_she) + COUNT(names_he) };

static const char *const colours[] = {"red",   "blue",   "green", "pink",  "white", "black",
                                      "brown", "grey",   "gold",  "tan",   "lime",  "teal",
                                      "plum",  "silver", "rust",  "cream", "navy",  "orange"};
static const char *const pets[] = {"Pip",   "Rufus", "Dusty",   "Bolt",  "Fudge",  "Luna",
                                   "Milo",  "Nut",   "Patch",   "Spot",  "Toby",   "Waffle",
                                   "Ziggy", "Coco",  "Biscuit", "Socks", "Pepper", "Oscar"};
static const char *const foods[] = {"soup", "bread", "rice",  "cake",   "fish",  "jam",
                                    "pie",  "corn",  "ham",   "stew",   "toast", "beans",
                                    "nuts", "plums", "salad", "cheese", "honey", "pasta"};
static const char *const towns[] = {"Oakham", "Dover", "Leeds", "York",  "Bath",  "Hull",
                                    "Rugby",  "Derby", "Luton", "Truro", "Wells", "Ripon",
                                    "Perth",  "Cork",  "Paris", "Rome",  "Oslo",  "Bern"};
static const char *const trades[] = {"baker",  "farmer", "nurse",  "tailor",  "sailor", "miner",
                                     "cook",   "guard",  "judge",  "painter", "smith",  "clerk",
                                     "weaver", "potter", "barber", "doctor",  "pilot",  "singer"};
static const char *const spots[] = {"bridge", "bed",   "stairs", "table", "tree", "bench",
                                    "mat",    "stone", "chair",  "cart",  "desk", "rug",
                                    "roof",   "shelf", "stove",  "tent",  "boat", "hedge"};
static const char *const gifts[] = {"lamp", "drum",  "kite", "book",  "clock", "doll",
                                    "ring", "flute", "mug",  "scarf", "pen",   "vase",
                                    "coat", "bell",  "map",  "sled",  "mask",  "fan"};
static const char *const months[] = {"Monday", "Tuesday", "May",    "June",   "July",   "March",
                                     "April",  "Easter",  "Friday", "Sunday", "autumn", "winter",
                                     "spring", "summer",  "dawn",   "noon",   "dusk",   "night"};

/*
 * The answer repeats the fact's statement word for word up to the value, so that a model of two
 * million weights can learn to look the value up.
 */
static const struct {
    const char *thing; /* "The <thing> of <name> is <lead>" */
    const char *lead;
    const char *asks; /* "<asks> the <thing> of <name>?" */
    const char *const *values;
    size_t n_values;
} kinds[] = {
    {"hat", "", "What colour is", colours, COUNT(colours)},
    {"dog", "", "Who is", pets, COUNT(pets)},
    {"meal", "", "What is", foods, COUNT(foods)},
    {"home", "", "Where is", towns, COUNT(towns)},
    {"trade", " a", "What is", trades, COUNT(trades)},
    {"key", " under the", "Where is", spots, COUNT(spots)},
    {"gift", " a", "What is", gifts, COUNT(gifts)},
    {"feast", "", "When is", months, COUNT(months)},
};
enum { N_KINDS = COUNT(kinds), MAX_FACTS = N_NAMES * N_KINDS };

/*
 * Narrative. %A and %B are the scene's people, %a and %b their pronouns, %P its place, %T its
 * thing, %Q its quality, %W the weather, %C anyone else; [x|y] is a free choice. The scene's words
 * are the same for some sentences, a dependency that a bigram model cannot use.
 */
static const char *const places[] = {"park",   "market", "river", "forest", "beach", "school",
                                     "garden", "farm",   "hill",  "lake",   "shop",  "barn"};
static const char *const things[] = {"ball",  "box",  "basket", "wagon", "rope", "stick",
                                     "shell", "coin", "apple",  "bird",  "frog", "flower"};
static const char *const qualities[] = {"big",  "little", "long",  "shiny",
                                        "soft", "heavy",  "funny", "pretty"};
static const char *const weathers[] = {"sunny", "rainy", "windy", "cold", "warm", "foggy"};

static const char *const openings[] = {
    "One [morning|evening|day], %A and %B went to the %P. The day was %W.",
    "It was a %W day, and %A was at the %P with %B.",
    "The next day, %A met %B at the %P. It was %W.",
    "Later, %A walked to the %P to see %B. The wind was [soft|loud], and the day was %W.",
};
static const char *const fillers[] = {
    "%A saw a %Q %T near the %P.",
    "%A took the %Q %T and gave it to %B.",
    "\"Do you like the %T?\" asked %A. \"Yes, I like the %T very much,\" said %B.",
    "\"Is this your %T?\" asked %B. \"No, it is not my %T,\" said %A.",
    "%A and %B played with the %T until it was [late|dark].",
    "%B was [happy|tired|hungry], and so was %A.",
    "%A sat down by the %P and looked at the %T.",
    "Then %a put the %T back and ran to %B.",
    "%B said that the %T was too %Q to carry.",
    "They laughed and ran around the %P [once|twice] more.",
    "%A was [sad|glad] because the %T was %Q.",
    "\"Come here, %B!\" said %A. \"Look at the %Q %T!\"",
    "%B tried to lift the %T, but %b could not.",
    "After a while, %C came to the %P too.",
    "%C waved at %A and %B and [smiled|went away|sat down].",
    "At the %P, the %W day felt [long|short].",
    "%B helped %A to clean the %T.",
    "\"We should go home now,\" said %A, but %B wanted to stay.",
    "%A told %B a story about a %Q %T and a [king|mouse|giant|fox].",
    "They shared some [milk|tea|water] and talked about the %T.",
    "In the end, %B gave the %T to %C.",
    "%A hid the %T, and %B had to find it.",
    "\"One, two, three!\" said %B, and %A threw the %T.",
    "%B thanked %A for the %Q %T.",
};

/* ---- random numbers: splitmix64 (Steele, Lea, Flood 2014) ---- */

static uint64_t rng_next(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9E3779B97F4A7C15));
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

/* Uniform in [0, n) but for a bias below n / 2^32: no loop, so the stream never depends on n. */
static uint32_t rng_below(uint64_t *state, size_t n)
{
    return (uint32_t)(((rng_next(state) >> 32) * (uint64_t)n) >> 32);
}

/* ---- the writer ---- */

typedef struct event {
    size_t time;
    uint32_t fact;
    bool asks;
} event;

typedef struct fact {
    uint32_t name, kind, value;
    uint32_t said_at, value_at; /* byte offsets once stated */
    bool said;
} fact;

typedef struct writer {
    uint64_t rng;
    char *text;
    size_t n_bytes, cap;
    size_t n_words; /* words and marks so far: the story's clock */
    bool failed;
    uint32_t a, b; /* the scene */
    const char *place, *thing, *quality, *weather;
    uint32_t scene_left;
    uint32_t last_filler;
} writer;

static const char *name_of(uint32_t i)
{
    return i < COUNT(names_she) ? names_she[i] : names_he[i - COUNT(names_she)];
}

static void put(writer *w, const char *s, size_t n)
{
    if (w->failed)
        return;
    if (n + 1 > w->cap - w->n_bytes) {
        size_t cap = w->cap * 2 + n + 64;
        char *p = realloc(w->text, cap);
        if (!p) {
            w->failed = true;
            return;
        }
        w->text = p;
        w->cap = cap;
    }
    memcpy(w->text + w->n_bytes, s, n);
    w->n_bytes += n;
    w->text[w->n_bytes] = '\0';
}

/* The clock: a run of letters is one word, any other visible byte one mark, a newline one. */
static size_t count_words(const char *s, size_t n)
{
    size_t words = 0;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (isalpha(c)) {
            if (i == 0 || !isalpha((unsigned char)s[i - 1]))
                words++;
        } else if (c != ' ') {
            words++;
        }
    }
    return words;
}

static void say(writer *w, const char *s)
{
    put(w, s, strlen(s));
}

#define PICK(w, a) ((a)[rng_below(&(w)->rng, COUNT(a))])

static void expand(writer *w, const char *t)
{
    for (; *t; t++) {
        if (*t == '%') {
            t++;
            switch (*t) {
            case 'A': say(w, name_of(w->a)); break;
            case 'B': say(w, name_of(w->b)); break;
            case 'C': say(w, name_of(rng_below(&w->rng, N_NAMES))); break;
            case 'a': say(w, w->a < COUNT(names_she) ? "she" : "he"); break;
            case 'b': say(w, w->b < COUNT(names_she) ? "she" : "he"); break;
            case 'P': say(w, w->place); break;
            case 'T': say(w, w->thing); break;
            case 'Q': say(w, w->quality); break;
            default: say(w, w->weather); break;
            }
        } else if (*t == '[') {
            const char *end = strchr(t, ']');
            size_t n = 1;
            for (const char *p = t; p < end; p++)
                n += *p == '|';
            uint32_t k = rng_below(&w->rng, n);
            const char *p = t + 1;
            while (k--)
                p = strchr(p, '|') + 1;
            put(w, p, strcspn(p, "|]"));
            t = end;
        } else {
            put(w, t, 1);
        }
    }
}

/* Sentences stand apart by a space, paragraphs by a newline; the first has neither. */
static void separate(writer *w)
{
    if (w->n_bytes && w->text[w->n_bytes - 1] != '\n')
        say(w, " ");
}

static void filler(writer *w)
{
    size_t from = w->n_bytes;
    if (w->scene_left == 0) {
        w->a = rng_below(&w->rng, N_NAMES);
        w->b = (w->a + 1 + rng_below(&w->rng, N_NAMES - 1)) % N_NAMES;
        w->place = PICK(w, places);
        w->thing = PICK(w, things);
        w->quality = PICK(w, qualities);
        w->weather = PICK(w, weathers);
        w->scene_left = 4 + rng_below(&w->rng, 6);
        if (w->n_bytes)
            say(w, "\n");
        expand(w, PICK(w, openings));
    } else {
        uint32_t k = rng_below(&w->rng, COUNT(fillers));
        if (k == w->last_filler)
            k = (k + 1) % (uint32_t)COUNT(fillers);
        w->last_filler = k;
        separate(w);
        expand(w, fillers[k]);
    }
    w->scene_left--;
    if (!w->failed)
        w->n_words += count_words(w->text + from, w->n_bytes - from);
}

/* "The hat of Lily is": the shared wording of statement and answer, up to the answer's word. */
static void say_lead(writer *w, const fact *f)
{
    say(w, "The ");
    say(w, kinds[f->kind].thing);
    say(w, " of ");
    say(w, name_of(f->name));
    say(w, " is");
    say(w, kinds[f->kind].lead);
}

static void say_value(writer *w, const fact *f)
{
    say(w, " ");
    say(w, kinds[f->kind].values[f->value]);
}

static void state_fact(writer *w, fact *f)
{
    separate(w);
    size_t from = w->n_bytes;
    say_lead(w, f);
    f->said_at = (uint32_t)from;
    f->value_at = (uint32_t)w->n_bytes;
    say_value(w, f);
    say(w, ".");
    f->said = true;
    if (!w->failed)
        w->n_words += count_words(w->text + from, w->n_bytes - from);
}

static void ask(writer *w, const fact *f, story_question *q)
{
    separate(w);
    size_t from = w->n_bytes;
    say(w, "Question: ");
    say(w, kinds[f->kind].asks);
    say(w, " the ");
    say(w, kinds[f->kind].thing);
    say(w, " of ");
    say(w, name_of(f->name));
    say(w, "? Answer: ");
    say_lead(w, f);
    q->fact = f->said_at;
    q->value = f->value_at;
    q->answer_begin = (uint32_t)w->n_bytes;
    say_value(w, f);
    q->answer_end = (uint32_t)w->n_bytes;
    say(w, ".");
    if (!w->failed)
        w->n_words += count_words(w->text + from, w->n_bytes - from);
}

/* ---- the plan ---- */

static int by_time(const void *x, const void *y)
{
    const event *a = x, *b = y;
    if (a->time != b->time)
        return a->time < b->time ? -1 : 1;
    if (a->asks != b->asks)
        return a->asks ? 1 : -1;
    return a->fact < b->fact ? -1 : a->fact > b->fact;
}

static void shuffle(writer *w, uint32_t *v, uint32_t n)
{
    for (uint32_t i = n; i > 1; i--) {
        uint32_t j = rng_below(&w->rng, i), t = v[i - 1];
        v[i - 1] = v[j];
        v[j] = t;
    }
}

/*
 * Values of one kind are drawn without replacement, so that two people share one only in long
 * stories. A short story uses few kinds: with one fact of a kind the name would not be needed.
 */
static void deal_facts(writer *w, fact *facts, size_t n)
{
    size_t n_kinds = n / 3 < 1 ? 1 : n / 3 < N_KINDS ? n / 3 : N_KINDS;
    uint32_t pairs[MAX_FACTS], order[N_KINDS];
    for (uint32_t i = 0; i < N_KINDS; i++)
        order[i] = i;
    shuffle(w, order, N_KINDS);
    uint32_t n_pairs = (uint32_t)(n_kinds * N_NAMES);
    for (uint32_t i = 0; i < n_pairs; i++)
        pairs[i] = i;
    shuffle(w, pairs, n_pairs);
    uint32_t cards[N_KINDS][32], used[N_KINDS] = {0};
    for (size_t k = 0; k < N_KINDS; k++) {
        for (uint32_t i = 0; i < kinds[k].n_values; i++)
            cards[k][i] = i;
        shuffle(w, cards[k], (uint32_t)kinds[k].n_values);
    }
    for (size_t i = 0; i < n; i++) {
        uint32_t kind = order[pairs[i] % n_kinds];
        facts[i] = (fact){.name = pairs[i] / (uint32_t)n_kinds, .kind = kind};
        facts[i].value = cards[kind][used[kind]++ % kinds[kind].n_values];
    }
}

/* What an event takes at most, in words: a story ends before it would be cut in one. */
enum { FACT_WORDS = 10, ASK_WORDS = 21, FILLER_WORDS = 28 };

static size_t plan(writer *w, event *events, size_t n_facts, size_t n_words)
{
    size_t n = 0, last = n_words - ASK_WORDS;
    for (uint32_t i = 0; i < n_facts; i++) {
        size_t said =
            rng_below(&w->rng, 2) ? rng_below(&w->rng, n_words / 8 + 1) : rng_below(&w->rng, last);
        size_t from = said + FACT_WORDS, span = last > from ? last - from : 1;
        if (rng_below(&w->rng, 3) == 0 && span > 150)
            span = 150;
        events[n++] = (event){.time = said, .fact = i};
        events[n++] = (event){.time = from + rng_below(&w->rng, span), .fact = i, .asks = true};
    }
    qsort(events, n, sizeof(*events), by_time);
    return n;
}

int story_make(story *out, uint64_t seed, size_t n_words)
{
    if (n_words < STORY_MIN_WORDS)
        n_words = STORY_MIN_WORDS;
    if (n_words > STORY_MAX_WORDS)
        n_words = STORY_MAX_WORDS;
    writer w = {.rng = seed, .last_filler = COUNT(fillers)};
    /* The seed is hashed: adjacent seeds must not give the same stream shifted. */
    w.rng = rng_next(&w.rng) ^ (uint64_t)n_words;

    /* Between two fifths and nearly all of the story are facts and questions. */
    size_t n_facts = n_words / (34 + rng_below(&w.rng, 42));
    if (n_facts < 2)
        n_facts = 2;
    if (n_facts > MAX_FACTS)
        n_facts = MAX_FACTS;
    fact facts[MAX_FACTS];
    event events[2 * MAX_FACTS];
    deal_facts(&w, facts, n_facts);
    size_t n_events = plan(&w, events, n_facts, n_words);

    story_question *questions = calloc(n_facts, sizeof(*questions));
    if (!questions)
        return -1;
    size_t n_questions = 0;
    for (size_t i = 0; i < n_events; i++) {
        while (w.n_words < events[i].time && w.n_words + FILLER_WORDS <= n_words)
            filler(&w);
        fact *f = &facts[events[i].fact];
        size_t need = events[i].asks ? ASK_WORDS : FACT_WORDS;
        if (w.n_words + need > n_words)
            continue;
        if (!events[i].asks)
            state_fact(&w, f);
        else if (f->said)
            ask(&w, f, &questions[n_questions++]);
    }
    while (w.n_words + FILLER_WORDS <= n_words)
        filler(&w);
    if (w.failed) {
        free(w.text);
        free(questions);
        return -1;
    }
    *out = (story){w.text, w.n_bytes, questions, n_questions};
    return 0;
}

void story_free(story *s)
{
    if (!s)
        return;
    free(s->text);
    free(s->questions);
    *s = (story){0};
}
