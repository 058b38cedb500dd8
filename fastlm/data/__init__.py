"""Token data: files, sampling order, batches."""
