"""What grows with files and ranks: start-up, memory, and what ranks send each other."""
