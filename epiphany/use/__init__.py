"""What a model is good for after training: answers, a conversation, a score."""
