"""What a batch's loss is and what its weight counts. One module per objective."""
