"""Parts of screens: each shows one thing and asks for what the user wants; none decides."""
