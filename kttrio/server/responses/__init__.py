"""OpenAI's responses, stateless."""
