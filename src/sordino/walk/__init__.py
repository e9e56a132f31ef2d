"""The block walker: where models come from, how they are walked through, how a checkpoint is put together."""
