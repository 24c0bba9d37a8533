"""The server beside other servers, under load for hours, under attack, and fed with any bytes."""
