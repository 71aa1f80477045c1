"""Pure ideas: tensors and numbers in, tensors and numbers out. No files, no trainers, no processes."""
