/* Convert text to ids with the WordPiece tokenizer of the model (words.bin). */
#include <stdint.h>

/* Read words.bin; return 0 on failure. */
int encode_load(const char *path);

/* Write the ids of a UTF-8 text, with the end-of-text id, and return their number. A long text is truncated. */
int encode(const char *text, int32_t *ids, int most);
