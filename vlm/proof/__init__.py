"""What a run must honour, checked on its own model, template and first records before its first step."""
