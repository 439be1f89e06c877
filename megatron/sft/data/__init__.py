"""From chat data to packed rows of tokens: reading, rendering, masks, packing, the .bin/.idx/.json file set."""
