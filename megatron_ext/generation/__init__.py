"""Text from a model: how tokens are drawn, and the engines that draw them."""
