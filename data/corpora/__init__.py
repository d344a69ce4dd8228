"""Sources of documents: files of text, records, Hugging Face datasets, a tokenised corpus of Megatron's."""
