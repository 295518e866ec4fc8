"""Base models: finding, loading and sharing them, and the adapter's layout."""
