/* WordPiece (Schuster and Nakajima 2012); a table contains the rules of the tokenizer.
   words.bin: int32 MAGIC, numbers of pieces, ranges and tokens, longest word, ids of an unknown word and of the end of
   a text; offset, length and id of each piece, sorted by bytes, and of each token, longest first; first, last, kind,
   offset and length of each range of characters; finally the bytes. */
#include "encode.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAGIC 0x31505754 /* "TWP1" */
#define LONGEST 512      /* largest number of bytes of a known word */

enum { UNKNOWN, DROPPED, SPACE, ALONE, PART }; /* the kinds of characters */

typedef struct {
  int32_t offset, length, id;
} Piece;
typedef struct {
  int32_t first, last, kind, offset, length;
} Range;

static int32_t head[7]; /* MAGIC, pieces, ranges, tokens, longest word, unknown, end */
static const Piece *pieces, *tokens;
static const Range *ranges;
static const char *bytes;

int encode_load(const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) return 0;
  fseek(file, 0, SEEK_END);
  long size = ftell(file);
  rewind(file);
  int32_t *all = malloc((size_t)size);
  int read = all && fread(all, 1, (size_t)size, file) == (size_t)size && size > (long)sizeof head;
  fclose(file);
  if (!read || all[0] != MAGIC) return 0;
  memcpy(head, all, sizeof head);
  pieces = (const Piece *)(all + 7);
  tokens = pieces + head[1];
  ranges = (const Range *)(tokens + head[3]);
  bytes = (const char *)(ranges + head[2]);
  return 1;
}

static int32_t character(const unsigned char **at) { /* the next code point; -1 for bytes that are not UTF-8 */
  const unsigned char *s = *at;
  int more = s[0] < 0x80 ? 0 : s[0] >= 0xC2 && s[0] < 0xE0 ? 1 : s[0] >= 0xE0 && s[0] < 0xF0 ? 2 : s[0] >= 0xF0 && s[0] < 0xF5 ? 3 : -1;
  int32_t code = more > 0 ? s[0] & (0x3F >> more) : s[0];
  *at = s + 1;
  if (more < 0) return -1;
  for (int i = 1; i <= more; i++) {
    if ((s[i] & 0xC0) != 0x80) return -1;
    code = code << 6 | (s[i] & 0x3F);
  }
  *at = s + 1 + more;
  return code;
}

static const Range *range_of(int32_t code) { /* NULL if no piece contains the character */
  int low = 0, high = head[2] - 1;
  while (low <= high) {
    int middle = (low + high) / 2;
    if (ranges[middle].last < code) low = middle + 1;
    else if (ranges[middle].first > code) high = middle - 1;
    else return ranges + middle;
  }
  return NULL;
}

static int32_t id_of(const char *piece, int length) { /* -1 for an unknown piece */
  int low = 0, high = head[1] - 1;
  while (low <= high) {
    int middle = (low + high) / 2, own = pieces[middle].length, shorter = own < length ? own : length;
    int order = memcmp(bytes + pieces[middle].offset, piece, (size_t)shorter);
    if (!order) order = own - length;
    if (!order) return pieces[middle].id;
    if (order < 0) low = middle + 1;
    else high = middle - 1;
  }
  return -1;
}

/* The current word: its bytes after "##", its number of characters, and whether pieces can contain all of them. */
static struct {
  char bytes[2 + LONGEST];
  int length, characters, known;
} word = {.bytes = "##", .known = 1};

static void add(const char *part, int length) {
  word.characters++;
  if (!part || word.length + length > LONGEST) word.known = 0;
  else memcpy(word.bytes + 2 + word.length, part, (size_t)length), word.length += length;
}

static int finish(int32_t *ids, int count, int most) { /* append the ids of the word, and start a new word */
  int before = count, whole = word.known && word.characters <= head[4];
  for (int start = 0; whole && start < word.length;) {
    int32_t id = -1;
    int end = word.length;
    for (; end > start; end--) { /* the longest piece first */
      char *piece = word.bytes + 2 + start, kept[2];
      if (start) { /* a piece that continues a word begins with "##" */
        piece -= 2;
        memcpy(kept, piece, 2), memcpy(piece, "##", 2);
      }
      id = id_of(piece, end - start + 2 * (start > 0));
      if (start) memcpy(piece, kept, 2);
      if (id >= 0) break;
    }
    if (id < 0) whole = 0;
    else if (count < most) ids[count++] = id;
    start = end;
  }
  if (!whole && word.characters) {
    count = before;
    if (count < most) ids[count++] = head[5];
  }
  word.length = word.characters = 0, word.known = 1;
  return count;
}

int encode(const char *text, int32_t *ids, int most) {
  int count = 0;
  const unsigned char *at = (const unsigned char *)text;
  while (*at && count < most) {
    const Piece *token = tokens;
    while (token < tokens + head[3] && strncmp((const char *)at, bytes + token->offset, (size_t)token->length)) token++;
    if (token < tokens + head[3]) { /* a token such as <extra_id_0> has priority over words */
      count = finish(ids, count, most);
      if (count < most) ids[count++] = token->id;
      at += token->length;
      continue;
    }
    const Range *range = range_of(character(&at));
    int kind = range ? range->kind : UNKNOWN;
    const char *part = range && range->length ? bytes + range->offset : NULL;
    if (kind == DROPPED) continue;
    if (kind == SPACE || kind == ALONE) count = finish(ids, count, most);
    if (kind != SPACE) add(part, range ? range->length : 0);
    if (kind == ALONE) count = finish(ids, count, most);
  }
  count = finish(ids, count, most);
  if (count == most) count--;
  ids[count++] = head[6];
  return count;
}
