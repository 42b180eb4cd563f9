"""Jobs for runs in several processes, and what starts them."""
