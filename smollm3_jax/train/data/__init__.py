"""From files of documents to packed batches of token ids."""
