/* The ids of a text by the WordPiece tokenizer of the model (words.bin). */
#include <stdint.h>

/* Read words.bin; 0 if it cannot be read. */
int encode_load(const char *path);

/* Write the ids of a UTF-8 text, with the end-of-text id, and return their number. A long text loses its end. */
int encode(const char *text, int32_t *ids, int most);
