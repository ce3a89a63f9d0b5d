// FastAPI's page of the API, without what its own loads from elsewhere.
SwaggerUIBundle({ url: "/openapi.json", dom_id: "#api" });
