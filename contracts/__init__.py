"""What passes between the stages. The ground floor: it imports nothing of ours, and no torch at import."""
