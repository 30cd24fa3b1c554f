"""Writing a merged model in fewer bits."""
